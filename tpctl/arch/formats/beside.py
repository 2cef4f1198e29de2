"""Where a model says that its weights are quantised: in ``config.json``, or in the file that ModelOpt writes beside it.

    hf_quant_config.json    {"producer": {"name": "modelopt", ...}, "quantization": {"quant_algo": "FP8",
                            "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}

Newer exports say the same in ``config.json``, which holds where there are both (vLLM 0.33, ``model_loader/
weight_utils.py``); of older ones that file alone tells (``nvidia/*-FP8``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpctl.json_file import read_object

FILE = "hf_quant_config.json"
KEYS = ("quantization_config", "compression_config")


def is_quantised(folder: Path) -> str | None:
    """What of the model in ``folder`` says so, as a message names it; ``None``: nothing does."""
    if (key := _key(read_object(folder / "config.json"))) is not None:
        return f"{key} in its config.json"
    return f"by its {FILE}" if read_object(folder / FILE, default={}) else None


def told_beside(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``FILE`` says, where ``config``, that of ``folder``, says nothing; empty where there is none."""
    return {} if _key(config) is not None else read_object(folder / FILE, default={})


def _key(config: Mapping[str, Any]) -> str | None:
    text = config.get("text_config")
    parts = (config, text if isinstance(text, Mapping) else {})
    return next((key for key in KEYS if any(one.get(key) for one in parts)), None)
