"""Linears cut along their input: how they are cut, and that the runs sum to the whole."""

from __future__ import annotations

import pytest
import torch

from tpctl.kernels.linear.split_linear import pick_splits, split_linear


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_runs_sum_to_the_linear(splits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(20, 256, generator=generator), torch.randn(24, 256, generator=generator)
    runs = split_linear(x, weight, splits)
    assert runs.shape == (splits, 20, 24)
    width = 256 // splits
    for index, run in enumerate(runs):
        columns = slice(index * width, (index + 1) * width)
        torch.testing.assert_close(run, x[:, columns] @ weight[:, columns].T)
    torch.testing.assert_close(runs.sum(0), x @ weight.T)


@pytest.mark.parametrize(
    "rows,out_features,in_features,splits",
    [
        (16, 4096, 14336, 1),
        (17, 4096, 14336, 2),
        (256, 4096, 14336, 2),
        (256, 6144, 4096, 1),
        (257, 6144, 4096, 2),
        (320, 4096, 14336, 2),
        (321, 4096, 14336, 1),
        (512, 1024, 3072, 4),
        (513, 1024, 3072, 1),
        (64, 28672, 4096, 1),
        (64, 3072, 4096, 2),
        (64, 4096, 1024, 1),
        (64, 1024, 3072, 4),
        (64, 1024, 1024, 4),
        (64, 576, 576, 1),
        (64, 1024, 1088, 1),
    ],
)
def test_choice(rows: int, out_features: int, in_features: int, splits: int) -> None:
    assert pick_splits(rows, out_features, in_features) == splits
