"""A flipped bit in the manifest is found, and the message names the tensor and its rank, or the field."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.damaging import damaged, named, replaced
from tests.unit.damaging import out as out
from tpctl.manifest.manifest import MANIFEST, Manifest


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found_and_named(out: Path, data: st.DataObject) -> None:
    raw = (out / MANIFEST).read_bytes()
    place, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
    message = damaged(out, raw[:place] + bytes([raw[place] ^ (1 << bit)]) + raw[place + 1 :])
    for word in named(raw, place):
        assert word in message, (raw[place - 30 : place + 30], message)
    assert re.search(r"written: \S", message), message


QKV, O_PROJ, GATE_UP = (
    f"model.layers.0.{name}.weight" for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj")
)
RANK_1 = '\n  "1":{'


@pytest.mark.parametrize(
    ("after", "old", "new", "said"),
    [
        # Changes of more than a bit, which undoing does not find.
        (RANK_1, '"start":[12,0]', '"start":[77,0]', f"the pieces of {QKV} of rank 1"),
        (f'"{O_PROJ}":{{"part"', '"rule":"row"', '"rule":"qkv"', f"the rule of {O_PROJ} of rank 0"),
        (RANK_1, '"dtype":"BF16"', '"dtype":"F16"', "the dtype of model.embed_tokens.weight of rank 1"),
        (RANK_1, '"label":"up"', '"label":"UP"', f"the pieces of {GATE_UP} of rank 1"),
        (RANK_1, '"lm_head.weight":{"part"', '"lm_tail.weight":{"part"', "lm_head.weight of rank 1 is missing"),
        (RANK_1, '"size":', '"size":11', "size or header of model-rank-1-part-0.safetensors (rank 1)"),
        ('"tokenizer.json":{', '"size":', '"size":11', "size or digest of tokenizer.json"),
        ("", '"id":"model"', '"id":"other"', "it is in what only the manifest says"),
    ],
)
def test_edits_are_named_by_what_they_contradict(out: Path, after: str, old: str, new: str, said: str) -> None:
    assert said in damaged(out, replaced((out / MANIFEST).read_bytes(), old, new, after))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_of_a_rank_that_is_not_here_too(out: Path, data: st.DataObject) -> None:
    """Nothing but the manifest knows its digests, so undoing the flip is all there is."""
    here = out.with_name("here")
    if not here.is_dir():
        shutil.copytree(out, here)
        for path in here.glob("model-rank-1-*"):
            path.unlink()
    raw = (here / MANIFEST).read_bytes()
    first = raw.index(RANK_1.encode())
    places = [match.end() for match in re.finditer(b'"digest":"', raw[first:])]
    place = first + data.draw(st.sampled_from(places)) + data.draw(st.integers(0, 63))
    message = damaged(here, raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
    for word in named(raw, place):
        assert word in message, message


def test_a_digest_is_told_by_reading_the_bytes(out: Path) -> None:
    raw = (out / MANIFEST).read_bytes()
    digest = Manifest.load(out).tensors(1)["model.norm.weight"].digest
    edited = raw.replace(digest.encode(), digest[::-1].encode())
    # Norms are the same on both ranks, so the first that has the digest is named.
    assert "the digest of model.norm.weight of rank 0" in damaged(out, edited)
    assert damaged(out, edited, verify=False).endswith("shard the model again")


def test_a_newer_format_is_not_called_damaged(out: Path) -> None:
    value = json.loads((out / MANIFEST).read_text())
    value["format_version"] = 42
    assert "has format version 42, this tpctl reads version 1" in damaged(out, json.dumps(value).encode())
    assert "was altered" not in damaged(out, json.dumps(value).encode())
