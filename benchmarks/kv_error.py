"""What keeping keys and values in fewer bits costs a model: errors of keys, values, attention and logits, on a CPU.

    python benchmarks/kv_error.py [MODEL] [--tokens N] [--window N] [--json FILE]

The model computes in float32; only what its layers keep of a token is rounded, in each form beside the others. Errors
of keys, values and attention outputs are norms of differences over norms, in a layer that is given exact inputs: the
mean over the layers, and the worst one. Logits are those of a whole model that keeps all in that form, beside one that
keeps float32: the Kullback-Leibler divergence KL(float32 || form) in nats, and how often both have the same likeliest
token. ``packed`` needs Triton, to be imported, and no GPU. ``tpctl bench quality --kv-cache-dtype fp8
--against-kv-cache-dtype model`` compares logits too, of the engine as it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tpctl.bench.passage import PASSAGE
from tpctl.bench.quality import tokens_of
from tpctl.checkpoint.sources import resolve
from tpctl.distributed import TPGroup
from tpctl.engine.engine import make_runner
from tpctl.engine.scheduling.block_manager import BlockManager
from tpctl.engine.scheduling.scheduled import ScheduledBatch, ScheduledSequence
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.engine.steps.batch import build_forward_batch
from tpctl.kernels.attention.fp8_vectors import LARGEST, dequantise, quantise
from tpctl.sharding.cache import ensure_sharded
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

Form = Callable[[Tensor], Tensor]


def fp8(x: Tensor) -> Tensor:
    """As it is built: of bfloat16 numbers, as GPUs compute them."""
    return dequantise(*quantise(x.bfloat16()), torch.float32)


def fp8_by(scale_of: Callable[[Tensor], Tensor]) -> Form:
    """FP8 with other scales, float32 [.., 1] of the largest |value| of each vector."""

    def rounded(x: Tensor) -> Tensor:
        x = x.bfloat16().float()
        scale = scale_of(x.abs().amax(-1, keepdim=True))
        return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale

    return rounded


def packed(x: Tensor) -> Tensor:
    from tpctl.kernels.attention.packed_kv import pack_reference, unpack_reference

    return unpack_reference(*pack_reference(x.bfloat16().contiguous()))


FORMS: dict[str, Form] = {
    "bfloat16 (model)": lambda x: x.bfloat16().float(),
    "packed": packed,
    "fp8": fp8,
    "fp8, scale float32": fp8_by(lambda top: top / LARGEST),
    "fp8, scale a power of two": fp8_by(lambda top: (top / LARGEST).log2().ceil().exp2()),
    "fp8, no scale": fp8_by(torch.ones_like),
}


class Rounding:
    """Stands before a backend's attention: keys and values become what a form leaves of them."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.form: Form | None = None
        self.measured = False
        self.errors: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(
            lambda: defaultdict(lambda: [0.0, 0.0])
        )

    def run(self, qkv: Tensor, prepare: Any, kv: Any, plan: Any, sinks_N: Tensor | None = None) -> Tensor:
        """As of the backend, for prompts that are computed whole: these read no cache."""
        angles = plan.angles(prepare.rotary, qkv.dtype)
        q, k, v = prepare(qkv, kv.spec.num_heads, kv.spec.num_kv_heads, angles)
        if self.form is not None:
            k, v = self.form(k), self.form(v)
        out: Tensor = self.backend.attend(q, k, v, kv, plan, sinks_N)
        if self.measured:
            for name, form in FORMS.items():
                less_k, less_v = form(k), form(v)
                less_out = self.backend.attend(q, less_k, less_v, kv, plan, sinks_N)
                for what, got, want in (("keys", less_k, k), ("values", less_v, v), ("attention", less_out, out)):
                    sums = self.errors[name, what][id(kv)]
                    sums[0] += float((got - want).double().square().sum())
                    sums[1] += float(want.double().square().sum())
        return out

    def of_layers(self, name: str, what: str) -> list[float]:
        return [(wrong / whole) ** 0.5 for wrong, whole in self.errors[name, what].values()]


def measure(model: str, tokens: int | None, window: int) -> dict[str, Any]:
    """The figures of every form."""
    if find_spec("triton") is None:
        FORMS.pop("packed", None)
        print("no Triton: packed is left out", file=sys.stderr)
    config = EngineConfig(
        ensure_sharded(resolve(model), 1), 1, dtype="float32", kv_cache_dtype="model", max_num_seqs=1,
        max_num_batched_tokens=window, max_model_len=window + 1, block_size=16,
    )  # fmt: skip
    prefix, ids = tokens_of(config, PASSAGE, tokens)
    runner = make_runner(config, TPGroup())
    rounding = Rounding(runner.backend)
    runner.backend.run = rounding.run  # type: ignore[method-assign]

    def logprobs(part: list[int]) -> Tensor:
        sequence = Sequence("text", part, SamplingParams(), window + 1)
        blocks = BlockManager(runner.memory.num_blocks, 16, enable_prefix_caching=False)
        assert blocks.grow(sequence, len(part))
        batch = ScheduledBatch([ScheduledSequence(sequence, 0, len(part), False)], 0)
        forward = build_forward_batch(batch, 16, runner.group.device)
        logits: Tensor = runner.model(forward, runner.kv)
        return logits.log_softmax(-1)

    divergences: dict[str, list[Tensor]] = defaultdict(list)
    same: dict[str, int] = defaultdict(int)
    count = 0
    step = window - len(prefix)
    for start in range(0, len(ids), step):
        part = [*prefix, *ids[start : start + step]]
        rounding.form, rounding.measured = None, True
        want = logprobs(part)
        rounding.measured = False
        count += len(part)
        for name, form in FORMS.items():
            rounding.form = form
            got = logprobs(part)
            divergences[name].append((want.exp() * (want - got)).sum(-1).clamp(min=0))
            same[name] += int((got.argmax(-1) == want.argmax(-1)).sum())
        print(f"{count} of {len(ids)} tokens", file=sys.stderr)
    found = {}
    for name in FORMS:
        kl = torch.cat(divergences[name])
        row: dict[str, Any] = {
            what: {"mean": sum(layers) / len(layers), "worst": max(layers)}
            for what in ("keys", "values", "attention")
            for layers in (rounding.of_layers(name, what),)
        }
        found[name] = row | {
            "kl_mean": float(kl.mean()), "kl_p99": float(kl.quantile(0.99)), "same_top": same[name] / count,
        }  # fmt: skip
    return {"model": model, "tokens": count, "window": window, "forms": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--tokens", type=int, help="of the package's own text; default: all")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with torch.inference_mode():
        found = measure(args.model, args.tokens, args.window)
    print(f"{found['model']}, {found['tokens']} tokens in windows of {found['window']}\n")
    print("| kept as | keys, mean / worst layer | values | attention | KL, mean / 99% | same likeliest token |")
    print("|---|---|---|---|---|---|")
    for name, row in found["forms"].items():
        errors = " | ".join(f"{row[w]['mean']:.2e} / {row[w]['worst']:.2e}" for w in ("keys", "values", "attention"))
        print(f"| {name} | {errors} | {row['kl_mean']:.2e} / {row['kl_p99']:.2e} | {row['same_top']:.2%} |")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
