"""Models that call tools, and what they are asked."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.unit.tool_models import MODELS
from tpctl.client.tokenizer import Tokenizer

USER = {"role": "user", "content": "What is the weather?"}


@cache
def model(name: str) -> Tokenizer:
    with TemporaryDirectory() as folder:
        return MODELS[name].tokenizer(Path(folder))
