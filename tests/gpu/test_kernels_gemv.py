"""Small-batch linears with their fused parts against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, DTYPES, INTERPRET, relative_error
from tpctl.kernels.linear.gemv import (
    GemvConfig,
    GemvScratch,
    pick,
    pick_tensor_cores,
    small_linear,
    small_linear_reference,
)

pytestmark = pytest.mark.gpu


CONFIGS = [
    GemvConfig(2, 256),
    GemvConfig(4, 128, split_k=3),
    GemvConfig(1, 2048, num_warps=8),
    GemvConfig(2, 128, prefetch=2),
    GemvConfig(4, 64, split_k=2, prefetch=9, early=True),
    GemvConfig(32, 32, num_stages=3, dot=True),
    GemvConfig(64, 64, split_k=4, num_stages=2, dot=True),
    None,
]
# rows, output features, input features; a configuration without dot products takes four rows at most.
SHAPES = [(1, 101, 576), (1, 64, 1024), (2, 101, 576), (3, 67, 320), (4, 64, 1024), (5, 70, 320), (16, 130, 96)]
CASES = [(config, *shape) for config in CONFIGS for shape in SHAPES if shape[0] <= 4 or config is None or config.dot]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_of_tensor_cores_fit(itemsize: int, gated: bool) -> None:
    for in_features in (96, 1024, 4096, 14336):
        config = pick_tensor_cores(16, 4096, in_features, gated=gated, itemsize=itemsize)
        weights = config.block_n * (1 + gated) + 16
        assert (config.num_stages - 1) * weights * config.block_k * itemsize <= 200 << 10, in_features


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", ["plain", "bias+residual", "norm", "norm+gated", "all"])
@pytest.mark.parametrize("config,rows,out_features,in_features", CASES)
def test_matches_reference(config, rows, out_features, in_features, parts, dtype):
    gated = parts in ("norm+gated", "all")
    if config is None:
        config = pick(rows, out_features, in_features, gated=gated, itemsize=dtype.itemsize)
    torch.manual_seed(rows + out_features)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape) * scale).to(DEVICE, dtype)

    weight_rows = 2 * out_features if gated else out_features
    x = random(rows, in_features)
    weight = random(weight_rows, in_features, scale=in_features**-0.5)
    options = {}
    if parts in ("bias+residual", "all"):
        options = {"bias_O": random(weight_rows), "residual_TO": random(rows, out_features)}
    if "norm" in parts or parts == "all":
        options["norm"] = (1 + 0.1 * random(in_features), 1e-6)
    if gated:
        options["activation"] = "silu"
    wide = {
        key: (value[0].double(), value[1]) if key == "norm" else value if key == "activation" else value.double()
        for key, value in options.items()
    }
    want = small_linear_reference(x.double(), weight.double(), **wide)
    scratch = GemvScratch.allocate(DEVICE)
    for _ in range(2):
        out = torch.full((rows, out_features), float("nan"), device=DEVICE, dtype=dtype)
        small_linear(x, weight, scratch, out=out, config=config, pdl=not INTERPRET, **options)
        assert relative_error(out, want) < (1e-5 if dtype is torch.float32 else 8e-3)
    assert (scratch.counters == 0).all()


@pytest.mark.parametrize("rows", range(1, 17))
def test_every_linear_of_few_rows_can_be_sent(rows):
    """What a decoder takes for granted: whether there is a configuration is a matter of the rows alone."""
    for out_features in (576, 1024, 2048, 3072, 4096, 6144, 11008):
        for in_features in (96, 576, 1024, 1536, 2048, 3072, 4096, 7168, 14336):
            config = pick(rows, out_features, in_features)
            assert config is not None and config.block_n % 2 == 0
    assert pick(17, 4096, 4096) is None


def test_residual_in_place():
    x = torch.randn(1, 256, device=DEVICE)
    weight = torch.randn(64, 256, device=DEVICE)
    residual = torch.randn(1, 64, device=DEVICE)
    want = residual + x @ weight.T
    small_linear(x, weight, GemvScratch.allocate(DEVICE), residual_TO=residual, out=residual)
    assert relative_error(residual, want) < 1e-5


def test_narrow_gate_and_up_are_split():
    """A shared expert's, whose 8 blocks of 64 features would leave most of the chip idle."""
    assert [pick(8, features, 2048, gated=True).split_k for features in (512, 1024, 3072)] == [4, 4, 1]


def test_short_linears_of_a_few_rows_are_computed_on_the_cuda_cores():
    """Where two rows cost what one does; long ones read as fast as memory gives them, by tensor cores."""
    assert [pick(rows, 4096, 1024).dot for rows in (1, 2, 3, 4, 5)] == [False, False, False, False, True]
    assert [pick(rows, 3072, 1024, gated=True).dot for rows in (1, 2, 3)] == [False, False, True]
    assert pick(2, 2048, 1024) == GemvConfig(2, 256, num_warps=2)
    assert all(pick(2, *shape).dot for shape in ((4096, 4096), (151936, 1024), (2048, 4096)))
    assert pick(2, 512, 2048, gated=True).dot
