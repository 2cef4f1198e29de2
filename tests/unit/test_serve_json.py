"""Long answers become JSON in pieces, which are the same as the whole."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpctl.serve import json_pieces
from tpctl.serve.json_pieces import encode_pieces

PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=True) | st.text()
VALUES = st.recursive(PLAIN, lambda some: st.lists(some) | st.dictionaries(st.text(), some), max_leaves=40)


@given(value=VALUES, count=st.sampled_from([1, 63, 64, 65, 130]))
def test_pieces_are_the_whole(value: Any, count: int) -> None:
    for one in (value, [value] * count, {"choices": [{"logprobs": {"content": [value] * count}}] * 2}):
        assert encode_pieces(one) == msgspec.json.encode(one)


@pytest.mark.parametrize("choices", [1, 200])
def test_no_piece_is_long(choices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def noted(value: Any) -> bytes:
        made = msgspec.json.encode(value)
        sizes.append(len(made))
        return made

    monkeypatch.setattr(json_pieces, "encode", noted)
    row = {"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": -1.23456789}] * 20}
    rows = [row] * (40_000 // choices)
    whole = {"choices": [{"logprobs": {"content": rows}, "prompt_logprobs": rows, "text": ""}] * choices}
    assert len(encode_pieces(whole)) > 50_000_000
    assert max(sizes) < 70_000
