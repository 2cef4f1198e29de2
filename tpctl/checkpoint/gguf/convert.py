"""The conversion of a GGUF file: checked here, where no torch is, and done in a child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tpctl.checkpoint.cache import require_space
from tpctl.checkpoint.gguf.header import MAGIC, GgufError, read_magic
from tpctl.checkpoint.gguf.model import GgufModel
from tpctl.checkpoint.gguf.tokenizer import write_tokenizer
from tpctl.checkpoint.gguf.weights import write_weights
from tpctl.children import python_environment
from tpctl.errors import SourceError

_CONFIGS = ("config.json", "generation_config.json")


def check_gguf(path: Path) -> None:
    """Raise unless ``path`` begins like a GGUF file.

    Raises:
        SourceError: it does not, or it cannot be read.
    """
    magic = read_magic(path)
    if magic != MAGIC:
        if path.suffix != ".gguf":
            raise SourceError(f"{path} is no model: a file must be a .gguf, which begins with the letters GGUF")
        raise SourceError(
            f"{path} is not a GGUF file: it begins with {magic!r} instead of {MAGIC!r}; download it again"
        )


def convert_gguf(source: Path, folder: Path, *, started: Callable[[], None] | None = None) -> None:
    """Write the model that ``source`` is a file of as a Hugging Face checkpoint into ``folder``, which must exist.

    Args:
        started: called once the headers are read and found good, before the work begins.

    Raises:
        SourceError: the file is broken, or holds what tpctl does not run or understand (nothing is written then); or
            the disk is full.
    """
    check_gguf(source)
    try:
        model = GgufModel.read(source)
    except GgufError as error:
        raise SourceError(f"cannot convert {source}: {error}") from None
    require_space(folder, model.nbytes, f"converting {source.name}")
    if started is not None:
        started()
    child = subprocess.run(
        [sys.executable, "-m", "tpctl.checkpoint.gguf", str(source), str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=python_environment({**os.environ, "TOKENIZERS_PARALLELISM": "false"}),
        text=True,
        errors="replace",
    )
    if child.returncode < 0:
        raise SourceError(
            f"converting {source} was ended by signal {-child.returncode}; if the machine ran out of memory, close "
            "other programs and run it again"
        )
    if child.returncode:
        lines = [line for line in child.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {child.returncode}"
        raise SourceError(f"cannot convert {source}: {reason}")


def write_checkpoint(source: Path, folder: Path) -> None:
    """The child's work. Raises ``GgufError`` and ``OSError``, and may leave a part of the files."""
    model = GgufModel.read(source)
    write_tokenizer(model.vocabulary, model.config["max_position_embeddings"], folder)
    for name, value in zip(_CONFIGS, (model.config, model.generation), strict=True):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    write_weights(model, folder / "model.safetensors")
