"""The gate_up projection with its activation against the two one after the other."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import DEVICE, DTYPE, INTERPRET
from tpctl.kernels.common.launch import is_hopper
from tpctl.kernels.linear.gated_linear import GatedConfig, gated_linear, gated_linear_reference, pick_gated

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "rows,intermediate,config",
    [
        (17, 14336, GatedConfig(112, 128, 64, 64, 4, 5)),
        (64, 14336, GatedConfig(112, 128, 64, 64, 4, 5)),
        (65, 14336, GatedConfig(112, 128, 128, 64, 8, 4)),
        (128, 7168, GatedConfig(56, 64, 128, 128, 4, 3)),
        (24, 3072, GatedConfig(24, 32, 64, 128, 4, 6)),
        (16, 14336, None),
        (129, 14336, None),
        (64, 1536, None),  # tiles too narrow
        (64, 9728, None),  # 80 columns of a tile of 128
        (64, 28672, None),
    ],
)
def test_choice(rows: int, intermediate: int, config: GatedConfig | None) -> None:
    assert pick_gated(rows, intermediate, 4096, 132) == config
    assert pick_gated(rows, intermediate, 4092, 132) is None


@pytest.mark.skipif(not INTERPRET and not is_hopper(DEVICE), reason="needs a Hopper GPU")
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    "rows,hidden,intermediate",
    [(17, 192, 380), (40, 128, 3072)] if INTERPRET else [(17, 4096, 14336), (128, 4096, 7168), (40, 1024, 3072)],
)
def test_matches_linear_and_activation(rows: int, hidden: int, intermediate: int, activation: str) -> None:
    x = torch.randn(rows, hidden + 64).to(DEVICE, DTYPE)[:, :hidden]
    weight = (torch.randn(2 * intermediate, hidden) / hidden**0.5).to(DEVICE, DTYPE)
    config = pick_gated(rows, intermediate, hidden, 132)
    if config is None:  # a last program with few columns, and a step that ends within the inputs
        config = GatedConfig(24, 32, 64, 128, 4, 2)
    out = torch.full((rows, intermediate), float("nan")).to(DEVICE, DTYPE)
    for pdl in (False,) if INTERPRET else (False, True):
        got = gated_linear(x, weight, config, activation=activation, out=out, pdl=pdl)
        want = gated_linear_reference(x.double(), weight.double(), activation=activation)
        error = (got.double() - want).norm() / want.norm()
        assert error < (1e-5 if DTYPE is torch.float32 else 8e-3)


def test_too_many_rows_are_refused() -> None:
    x = torch.zeros(65, 64, device=DEVICE)
    with pytest.raises(ValueError, match="65 rows are more than the 64"):
        gated_linear(x, torch.zeros(64, 64, device=DEVICE), GatedConfig(24, 32, 64, 64, 4, 2))
