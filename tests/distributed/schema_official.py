"""The JSON Schema Test Suite, as ``jsonschema``'s source package has it: whether what is not valid can be answered.

pip download --no-deps --no-binary jsonschema jsonschema==4.26.0 && tar xzf jsonschema-4.26.0.tar.gz
python -m tests.distributed.schema_official jsonschema-4.26.0/json/tests

Of each draft it prints how many schemas are taken; of those that are, how many valid texts can be answered and how many
cannot (an answer has its fields in order and its numbers in one form), and how many that are not valid can. A schema
that is refused in words that name no keyword is printed.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.schemas_kinds import keywords
from tests.schemas_parts import DRAFTS
from tests.unit.walking import Walks
from tpctl.errors import RequestError

NAMES = {"draft4": 4, "draft6": 6, "draft7": 7, "draft2019-09": 2019, "draft2020-12": 2020}
_DAYS = re.compile(r"-02-29|:60")


def group(walks: Walks, schema: dict[str, Any], tests: list[dict[str, Any]]) -> Counter[str]:
    """What becomes of a schema and its tests."""
    try:
        walks.matcher(schema)
    except RequestError as error:
        if not any(word in str(error) for word in keywords(schema)) and "nsatisfiable" not in str(error):
            print(f"    {error}: {json.dumps(schema):.120}")
        return Counter({"refused": 1})
    found = Counter({"taken": 1})
    for test in tests:
        text = json.dumps(test["data"], ensure_ascii=False)
        can = walks.takes(schema, text)
        what = ("valid, " if test["valid"] else "not valid, ") + ("can be answered" if can else "cannot")
        if can and not test["valid"]:
            what += (
                ": a day or second that is none" if _DAYS.search(text) else f": {json.dumps(schema):.80}: {text:.40}"
            )
        found[what] += 1
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    walks = Walks(Path(tempfile.mkdtemp()))
    for name, draft in NAMES.items():
        found: Counter[str] = Counter()
        for file in [*sorted((folder / name).glob("*.json")), *sorted((folder / name).glob("optional/format/*.json"))]:
            for one in json.loads(file.read_text(encoding="utf-8")):
                if isinstance(one["schema"], dict):
                    found += group(walks, {"$schema": DRAFTS[draft], **one["schema"]}, one["tests"])
        print(name, *(f"    {count:5} {what}" for what, count in sorted(found.items())), sep="\n")


if __name__ == "__main__":
    main()
