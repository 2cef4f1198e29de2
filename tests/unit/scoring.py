"""Models whose prompts are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import make_checkpoint, make_mixture
from tpctl.sharding.cutting.shard import shard_checkpoint

VOCAB = 131

LENGTHS = (40, 1 + 9, 23)


class Models:
    """Two tiny models of one shape, the second disturbed, and their shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(3)
        self.prompts = [torch.randint(3, VOCAB, (length,)).tolist() for length in LENGTHS]
        self.models: dict[str, Any] = {"whole": make_checkpoint("llama2", folder / "whole")}
        self.models["recurrent"] = make_mixture("qwen3_5_text", folder / "recurrent")
        disturbed: Any = make_checkpoint("llama2", folder / "disturbed")
        with torch.no_grad():
            for parameter in disturbed.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        disturbed.save_pretrained(folder / "disturbed")
        self.models["disturbed"] = disturbed

    def shards(self, name: str, tp_size: int) -> Path:
        out = self.folder / f"{name}-{tp_size}"
        if not out.is_dir():
            shard_checkpoint(self.folder / name, out, tp_size)
        return out

    @torch.no_grad()
    def logprobs(self, name: str, prompt: list[int]) -> torch.Tensor:
        """float64 [length - 1, V]: what is said of each token but the first."""
        logits = self.models[name](torch.tensor([prompt])).logits[0, :-1]
        return logits.double().log_softmax(-1)
