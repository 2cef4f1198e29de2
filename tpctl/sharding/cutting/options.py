"""The options of `tpctl shard` that a shard folder was made with, for commands that are to make more of it."""

from __future__ import annotations

from tpctl.arch.source_plan import DEFAULT_PART_SIZE
from tpctl.manifest.manifest import Manifest
from tpctl.partition.dtypes import DTYPES


def cut_options(manifest: Manifest) -> str:
    """Those that differ from the defaults, each after a space: ``" --dtype float16 --even"``.

    What was quantised first, or cut as text only, is the source of a folder and not in it; ``shard`` itself says so.
    """
    given = {
        "dtype": manifest.dtype is not None,
        "max_part_size": manifest.max_part_size != DEFAULT_PART_SIZE,
        "compat": manifest.compat is not None,
        "expert_parallel": manifest.expert_parallel > 1,
        "even": manifest.even,
    }
    return "".join(f" {option(manifest, field)}" for field, differs in given.items() if differs)


def option(manifest: Manifest, field: str) -> str:
    """The option that makes ``field`` of a manifest what it is in ``manifest``."""
    value = getattr(manifest, field)
    match field:
        case "dtype":
            return f"--dtype {next((name for name, dtype in DTYPES.items() if dtype == value), 'auto')}"
        case "max_part_size":
            return f"--max-part-size {value}B"
        case "compat":
            return "no --compat" if value is None else f"--compat {value}"
        case "expert_parallel":
            return f"--ep {value}"
        case "even":
            return "--even" if value else "--no-even"
        case _:
            raise ValueError(f"no option of `tpctl shard` for {field}")
