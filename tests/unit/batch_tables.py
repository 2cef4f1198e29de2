"""Tables as data sets have them, as an input of batches without processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tpctl.batch.folder import JobFolder
from tpctl.batch.formats.choose import Asked, FormatSpec, choose
from tpctl.batch.formats.place import Formats
from tpctl.client.jobs import Line


def table(count: int, first: int = 0) -> pa.Table:
    """Rows of a data set with columns of many types."""
    numbers = range(first, first + count)
    return pa.table(
        {
            "question": [f"q{n}" for n in numbers],
            "key": [f"k{n}" for n in numbers],
            "label": pa.array([n % 3 for n in numbers], pa.int8()),
            "image": [bytes([n % 256]) for n in numbers],
            "when": pa.array(list(numbers), pa.timestamp("ms", tz="UTC")),
            "tags": [[str(n), None] for n in numbers],
            "nested": [{"a": n, "b": None} for n in numbers],
            "price": pa.array([float("nan") if n == 2 else n / 2 for n in numbers], pa.float32()),
        }
    )


def write(path: Path, data: pa.Table, group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(data, path, row_group_size=group)
    return path


def formats_of(prompts: Path | str, out: str = "out/", **asked: Any) -> Formats:
    """As replicas are told them."""
    spec = choose(str(prompts), out, Asked(**{"prompt_column": "question", **asked}), "echo")
    assert spec is not None
    return FormatSpec.from_json(json.loads(json.dumps(spec, default=vars))).formats()


def reply(line: Line) -> dict[str, Any]:
    entry = json.loads(line.raw)
    row = {"id": entry.get("key", line.number), "text": f"<{entry['question']}>", "finish_reason": "stop"}
    kept = {"kept": {name: entry[name] for name in entry.keys() - {"question", "key"}}}
    return {**row, "prompt_tokens": 2, "completion_tokens": 1, **(kept if kept["kept"] else {})}


def parts_read(folder: JobFolder) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for _, path in sorted(folder.parts().items())])
