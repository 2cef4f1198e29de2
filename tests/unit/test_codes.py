"""``decode`` against the definition, one number at a time."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.random_codes import random_codes
from tpctl.errors import ShardFolderError
from tpctl.kernels.common.codes import E2M1, Codes, Kind, as_floats, decode
from tpctl.layers.weights.stored import check_numbers


def number(codes: Codes, n: int, k: int) -> float:
    """W[n, k] by the definition."""
    if codes.kind in ("uint4", "e2m1"):
        byte = int(codes.values[n, k // 2])
        code = float(byte >> 4 if k % 2 else byte & 15)
        if codes.kind == "e2m1":
            code = E2M1[int(code) & 7] * (-1 if int(code) & 8 else 1)
    else:
        code = float(codes.values[n, k])
    row = n if codes.rows is None else int(codes.rows[n])
    column = (k + codes.first) // codes.unit if codes.groups is None else int(codes.groups[k])
    scale = codes.scales[row, column]
    scale = 2.0 ** (int(scale) - 127) if codes.scales.dtype == torch.uint8 else float(scale)
    zero = codes.zero if codes.zeros is None else float(codes.zeros[row, column])
    return (code - zero) * scale * (1.0 if codes.factors is None else float(codes.factors[n]))


@pytest.mark.parametrize("kind", get_args(Kind))
@given(data=st.data())
def test_every_number_is_the_definition_s(kind: Kind, data: st.DataObject) -> None:
    codes = random_codes(
        kind,
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(1, 21)),
        seed=data.draw(st.integers(0, 99)),
        unit=data.draw(st.integers(1, 22)),
        rows_unit=data.draw(st.integers(1, 4)),
        first=data.draw(st.integers(0, 3)),
        groups=data.draw(st.booleans()),
        zeros=data.draw(st.booleans()),
        factors=data.draw(st.booleans()),
        exponents=data.draw(st.booleans()),
    )
    start = data.draw(st.integers(0, codes.outputs - 1))
    found = decode(codes, start)
    expected = [[number(codes, n, k) for k in range(codes.columns)] for n in range(start, codes.outputs)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)


def test_exponents_at_their_ends() -> None:
    found = as_floats(torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8))
    assert found[:4].tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127] and math.isnan(found[4])


def test_an_expert_s_matrix() -> None:
    both = random_codes("uint4", 5, 8, unit=4, zeros=True, factors=True, experts=2)
    one = both.of_expert(1)
    assert torch.equal(one.values, both.values[1]) and one.zeros is not None and one.outputs == 5
    assert decode(one).shape == (5, 8)


def test_codes_of_no_number_are_refused_by_name() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    check_numbers("q_proj.weight", values[:127])
    with pytest.raises(ShardFolderError, match=r"^q_proj\.weight holds 2 of 256 values that are no numbers"):
        check_numbers("q_proj.weight", values)
