"""Times tpctl's kernels for gated delta nets on one GPU, beside their floors, at Qwen3.6-35B-A3B's sizes.

    python benchmarks/delta_bench.py [step] [chunks] [sweep]

Every figure is the median of several replays of a CUDA graph whose calls use other states of several layers, so that
these come from memory. The floor of a step is its states read and written once over the bandwidth that a large copy
reaches here. `error` is that of the result beside float32, by the same numbers. `sweep` tries other configurations of
the kernels for prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import torch
import triton
from kernel_timing import BF16, DEVICE, graph_us, row

from tpctl.kernels.delta_net import chunks as chunked
from tpctl.kernels.delta_net.chunks import ChunkTables, chunks, gated_norm
from tpctl.kernels.delta_net.inputs import NetShape, NetState, NetWeights, Projected
from tpctl.kernels.delta_net.step import StepRows, step
from tpctl.kernels.delta_net.tables import Chunks, NewTokens

QWEN = NetShape(16, 32, 128, 128, 4)
LAYERS = 4


def projected(count: int, shape: NetShape, dtype: torch.dtype = BF16) -> Projected:
    """Of random tokens, as Qwen3.5's merged linear gives it."""
    keys, values, heads = shape.key_heads * shape.key_dim, shape.value_heads * shape.value_dim, shape.value_heads
    starts = (0, keys, 2 * keys, 2 * keys + values, 2 * keys + 2 * values, 2 * keys + 2 * values + heads)
    all = torch.randn(count, starts[-1] + heads, device=DEVICE).to(BF16).to(dtype)
    q, k, v, z, b, a = (all[:, start:] for start in starts)
    each = shape.group * shape.value_dim
    return Projected(q, k, v, z, b, a, shape.key_dim, each, each, shape.group)


def weights(shape: NetShape, dtype: torch.dtype = BF16) -> NetWeights:
    taps = torch.randn(shape.taps, shape.channels, device=DEVICE) * 0.5
    decay = torch.rand(shape.value_heads, device=DEVICE), torch.rand(shape.value_heads, device=DEVICE) * 4 - 3
    return NetWeights(taps, *decay, torch.ones(shape.value_dim, device=DEVICE, dtype=dtype), 1e-6)


def states(slots: int, shape: NetShape, dtype: torch.dtype = BF16) -> NetState:
    matrices = torch.randn(slots, shape.value_heads, shape.key_dim, shape.value_dim, device=DEVICE)
    inputs = torch.randn(slots, shape.taps, shape.channels, device=DEVICE).to(BF16).to(dtype)
    return NetState(matrices, inputs)


def integers(columns: list[list[int]]) -> torch.Tensor:
    return torch.tensor(columns, dtype=torch.int32, device=DEVICE)


def bandwidth() -> float:
    """Bytes a microsecond of a copy of 2 GiB, read and written."""
    source, target = torch.empty(2, 1 << 30, dtype=torch.uint8, device=DEVICE)
    return float(2 * source.numel() / graph_us([partial(target.copy_, source)]))


def in_slots(count: int) -> StepRows:
    """Sequences in all slots, out of order, that have seen much."""
    slots = torch.randperm(count).int().to(DEVICE)
    return StepRows(slots, slots, torch.full_like(slots, -1), torch.randint(100, 9000, (count,)).int().to(DEVICE))


def bench_step() -> None:
    row("step", "rows", "us", "floor us", "TB/s", "error")
    rate, given = bandwidth(), weights(QWEN)
    for count in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        tokens, rows = projected(count, QWEN), in_slots(count)
        out = torch.empty(count, QWEN.value_heads * QWEN.value_dim, device=DEVICE, dtype=BF16)
        layers = [states(count, QWEN) for _ in range(24 if count < 16 else LAYERS)]
        size = 2 * layers[0].matrices.nbytes
        us = graph_us([partial(step, tokens, given, layer, rows, QWEN, out, pdl=True) for layer in layers])
        row("", count, f"{us:.1f}", f"{size / rate:.1f}", f"{size / us / 1e6:.2f}", f"{step_error(count):.1e}")


def step_error(count: int) -> float:
    """Of what a step gives, beside the same in float32."""
    torch.manual_seed(count)
    tokens, rows, given, layer = projected(count, QWEN), in_slots(count), weights(QWEN), states(count, QWEN)
    wide = [torch.empty(count, QWEN.value_heads * QWEN.value_dim, device=DEVICE, dtype=one) for one in WIDTHS]
    kept = [layer, NetState(layer.matrices.clone(), layer.inputs.float())]
    for out, state in zip(wide, kept, strict=True):
        of = NetWeights(*given[:3], given.norm.to(out.dtype), given.eps)
        step(in_dtype(tokens, out.dtype), of, state, rows, QWEN, out)
    return difference(*wide)


WIDTHS = (BF16, torch.float32)


def in_dtype(tokens: Projected, dtype: torch.dtype) -> Projected:
    """The same numbers, in one tensor again."""
    if tokens.q.dtype == dtype:
        return tokens
    all = tokens.q.to(dtype)
    parts = (all[:, one.storage_offset() - tokens.q.storage_offset() :] for one in tokens.tensors)
    q, k, v, z, b, a = parts
    return Projected(q, k, v, z, b, a, *tokens.steps)


def difference(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found.double() - want.double()).norm() / want.double().norm())


def prompts() -> Iterator[tuple[str, list[int]]]:
    yield "one of 16,384", [16384]
    yield "one of 12,000, one of 4,384", [12000, 4384]
    yield "16 of 1,024", [1024] * 16
    yield "128 of 128", [128] * 128
    yield "one of 2,048", [2048]
    yield "one of 64", [64]


def tables_of(lens: list[int]) -> ChunkTables:
    found, first = [], 0
    for slot, length in enumerate(lens):
        found.append(NewTokens(first, length, 0, -1, slot))
        first += length
    made = Chunks.of(found)
    return ChunkTables(integers(made.chunks), integers(made.sequences), made.groups)


def bench_chunks() -> None:
    row("prompts", "us", "norm us", "us a token", "error")
    for name, lens in prompts():
        tables, tokens, given, layer = tables_of(lens), projected(sum(lens), QWEN), weights(QWEN), states(128, QWEN)
        out = torch.empty(sum(lens), QWEN.value_heads * QWEN.value_dim, device=DEVICE, dtype=BF16)
        us = graph_us([partial(chunks, tokens, given, layer, tables, QWEN, out)])
        normed = graph_us([partial(gated_norm, tokens, given, QWEN, out)])
        chunks(tokens, given, layer, tables, QWEN, out)
        few = min(lens[0], 4096)
        error = chunks_error(few)
        row(name, f"{us:.0f}", f"{normed:.0f}", f"{us / sum(lens):.4f}", f"{error:.1e}")


def chunks_error(length: int) -> float:
    """Of one prompt, beside the same token by token in float32: as long as that is."""
    length = min(length, 512)
    torch.manual_seed(length)
    tokens, given, layer = projected(length, QWEN), weights(QWEN), states(1, QWEN)
    layer.matrices.zero_()
    layer.inputs.zero_()
    wide = in_dtype(tokens, torch.float32)
    norm = given.norm.float()
    one_by_one = NetState(layer.matrices.clone(), layer.inputs.float())
    slot, none = integers([[0]])[0], integers([[-1]])[0]
    shape = (1, QWEN.value_heads * QWEN.value_dim)
    found = []
    for at in range(length):
        out = torch.empty(shape, device=DEVICE)
        rows = StepRows(slot, slot, none, integers([[at + 1]])[0])
        step(wide.rows(slice(at, at + 1)), NetWeights(*given[:3], norm, given.eps), one_by_one, rows, QWEN, out)
        found.append(out)
    out = torch.empty(length, shape[1], device=DEVICE, dtype=BF16)
    chunks(tokens, given, layer, tables_of([length]), QWEN, out)
    gated_norm(tokens, given, QWEN, out)
    return difference(out, torch.cat(found))


def bench_sweep() -> None:
    """Each kernel's warps, and the tiles of the scan, for one prompt of 16,384 tokens and for 16 of 1,024."""
    row("conv warps, prepare warps, scan", "us, one", "us, 16")
    pick = chunked.pick_scan
    cases = [[16384], [1024] * 16]
    made = [(tables_of(lens), projected(sum(lens), QWEN), weights(QWEN), states(16, QWEN)) for lens in cases]
    out = torch.empty(16384, QWEN.value_heads * QWEN.value_dim, device=DEVICE, dtype=BF16)
    for conv in (4, 8):
        for prepare in (4, 8):
            for scan in ((16, 2, 4), (32, 1, 4), (32, 2, 4), (32, 3, 4), (64, 1, 4), (64, 2, 4), (64, 2, 8)):
                chunked.CONV_WARPS, chunked.PREPARE_WARPS = conv, prepare
                config = chunked.ScanConfig(*scan)
                chunked.pick_scan = lambda *_, config=config: config
                try:
                    times = [
                        graph_us([partial(chunks, two, three, four, one, QWEN, out)]) for one, two, three, four in made
                    ]
                except Exception as error:  # one that does not fit is no reason to leave the others out
                    times = []
                    print(type(error).__name__, str(error)[:90])
                row(f"{conv}, {prepare}, {config}", *(f"{us:.0f}" for us in times))
    chunked.pick_scan = pick


SECTIONS = {"step": bench_step, "chunks": bench_chunks, "sweep": bench_sweep}


def main() -> None:
    """Run the sections named on the command line, or all but the sweep."""
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    for name in sys.argv[1:] or ("step", "chunks"):
        with torch.inference_mode():
            SECTIONS[name]()
        print()


if __name__ == "__main__":
    main()
