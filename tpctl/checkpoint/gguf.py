"""GGUF files to Hugging Face checkpoint folders.

transformers reads the format and undoes the quantisation; the weights are written as bfloat16. That needs torch, so
it happens in a child process (``python -m tpctl.checkpoint.gguf SOURCE FOLDER``) and the caller stays light.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from tpctl.children import python_environment
from tpctl.errors import SourceError

MAGIC = b"GGUF"


def check_gguf(path: Path) -> None:
    """Raise unless ``path`` begins like a GGUF file.

    Raises:
        SourceError: it does not, or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from None
    if magic != MAGIC:
        if path.suffix != ".gguf":
            raise SourceError(f"{path} is no model: a file must be a .gguf, which begins with the letters GGUF")
        raise SourceError(
            f"{path} is not a GGUF file: it begins with {magic!r} instead of {MAGIC!r}; download it again"
        )


def convert_gguf(source: Path, folder: Path) -> None:
    """Write the model of ``source`` as a Hugging Face checkpoint into ``folder``, which must exist.

    Raises:
        SourceError: the file is broken, transformers cannot read its architecture, or the disk is full.
    """
    check_gguf(source)
    command = [sys.executable, "-m", "tpctl.checkpoint.gguf", str(source), str(folder)]
    # Progress bars and warnings of the libraries say nothing that a user can act on; our own last line does.
    child = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=python_environment({**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}),
        text=True,
        errors="replace",
    )
    if child.returncode < 0:
        raise SourceError(
            f"converting {source} was ended by signal {-child.returncode}; it holds the whole model in "
            "memory, so give it more (about 2 bytes a parameter, twice) or use a safetensors checkpoint"
        )
    if child.returncode:
        lines = [line for line in child.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {child.returncode}"
        raise SourceError(f"cannot convert {source}: {reason}")


def _convert(source: Path, folder: Path) -> None:
    """The child's work; torch and transformers are imported here."""
    from tpctl.checkpoint.cache import require_space

    _keep_what_is_parsed()
    rope = _rope_scaling(source)

    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": source.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # older releases always undo the quantisation, and have no such class
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(str(source.parent), **options)
    if rope is not None:
        parameters = dict(getattr(model.config, "rope_parameters", None) or {})
        model.config.rope_parameters = {**parameters, **rope}
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    require_space(folder, size, f"converting {source.name}")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which would keep a shared cache's other users out


def _keep_what_is_parsed() -> None:
    """Halve the time: transformers parses the file anew for config, weights and tokenizer, and builds the map of
    tensor names once for every module of the model. This process converts one file, so both are kept."""
    import gguf

    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(gguf, name, cache(getattr(gguf, name)))


def _rope_scaling(source: Path) -> dict[str, Any] | None:
    """The RoPE scaling of ``source`` as transformers 5 writes it, or ``None`` where the file has none.

    transformers drops it silently. llama.cpp stores Llama 3's rule only by its result, one divisor per
    frequency in the tensor ``rope_freqs.weight``; the rule is recovered from the largest divisor, with the
    constants that every Llama 3 model has, and accepted only if it gives back that tensor.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(source))
    except Exception as error:  # whatever a wild length or offset leads to
        raise ValueError(f"the file is damaged or cut short ({error}); download it again") from None
    arch = _value(reader, "general.architecture")
    kind = _value(reader, f"{arch}.rope.scaling.type")
    if kind not in (None, "none"):
        if kind != "linear":
            raise ValueError(f"its RoPE scaling {kind!r} cannot be converted; use the model's safetensors checkpoint")
        return {"rope_type": "linear", "factor": float(_value(reader, f"{arch}.rope.scaling.factor"))}
    stored = [tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    if not stored:
        return None
    divisors = [float(value) for value in stored[0].data.ravel()]
    theta = float(_value(reader, f"{arch}.rope.freq_base") or 10000.0)
    rule = {"factor": max(divisors), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    original = 8192
    expected = _llama3_divisors(len(divisors), theta, original, **rule)
    if any(abs(a - b) > 1e-2 * b for a, b in zip(divisors, expected, strict=True)):
        raise ValueError("its RoPE divisors follow no known rule; use the model's safetensors checkpoint")
    return {"rope_type": "llama3", **rule, "original_max_position_embeddings": original}


def _llama3_divisors(
    count: int, theta: float, original: int, *, factor: float, low_freq_factor: float, high_freq_factor: float
) -> list[float]:
    """What Llama 3's rule (its 3.1 release) divides each of ``count`` RoPE frequencies by."""
    from math import pi

    divisors = []
    for index in range(count):
        turns = original * theta ** (-index / count) / (2 * pi)  # full turns within the original context
        if turns > high_freq_factor:
            divisors.append(1.0)
        elif turns < low_freq_factor:
            divisors.append(factor)
        else:
            smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
            divisors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return divisors


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _main() -> int:
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        _convert(source, folder)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # anything here is the file's or the machine's fault; the parent shows one line
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{text[:300]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
