"""Decode steps one after another: what ``sdpa`` keeps gathered gives what gathering anew would."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.unit.attention_cases import BLOCK, written_out
from tpctl.layers.attention import sdpa_gathering
from tpctl.layers.attention.base import AttentionSpec
from tpctl.layers.attention.sdpa import SdpaBackend
from tpctl.layers.batch import ForwardBatch, PoolTables

HEADS = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=12, scale=1 / math.sqrt(12))
SIZES = [HEADS.num_heads, HEADS.num_kv_heads, HEADS.num_kv_heads]
LAYERS = 2


class Server:
    """Sequences of random tokens in a small cache, stepped as the engine does."""

    def __init__(self, window: int | None = None) -> None:
        torch.manual_seed(0)
        self.spec = replace(HEADS, window=window)
        self.backend = SdpaBackend([self.spec] * LAYERS, BLOCK)
        self.kv = self.backend.allocate(64, torch.float32, torch.device("cpu"))
        self.free = torch.randperm(64).tolist()
        self.tokens: dict[str, Tensor] = {}  # [layers, L, N + 2 K, D]
        self.blocks: dict[str, list[int]] = {}

    def step(self, new: dict[str, int]) -> list[bool]:
        """Compute so many new tokens of each; checks the results. Whether each bucket of decodes went on."""
        starts = {}
        for name, count in new.items():
            old = self.tokens.get(name, torch.zeros(LAYERS, 0, sum(SIZES), HEADS.head_dim))
            starts[name] = old.shape[1]
            self.tokens[name] = torch.cat([old, torch.randn(LAYERS, count, *old.shape[2:])], dim=1)
            blocks = self.blocks.setdefault(name, [])
            while len(blocks) * BLOCK < self.tokens[name].shape[1]:
                blocks.append(self.free.pop())
        lens = [self.tokens[name].shape[1] for name in new]
        tables = torch.zeros(len(new), max(len(self.blocks[name]) for name in new), dtype=torch.int32)
        for row, name in enumerate(new):
            tables[row, : len(self.blocks[name])] = torch.tensor(self.blocks[name])
        slots = [
            self.blocks[name][at // BLOCK] * BLOCK + at % BLOCK
            for name, count in new.items()
            for at in range(starts[name], starts[name] + count)
        ]
        batch = ForwardBatch(
            input_ids=torch.zeros(len(slots), dtype=torch.int64),
            rope_positions=torch.zeros(len(slots), dtype=torch.int64),
            pools=(PoolTables(torch.tensor(slots), tables),),
            query_lens=list(new.values()),
            seq_lens=lens,
            num_decodes=sum(count == 1 for count in new.values()),
            logits_rows=torch.zeros(0, dtype=torch.int64),
        )
        plan = self.backend.begin(batch)
        for layer, kv in enumerate(self.kv):
            fresh = [self.tokens[name][layer, starts[name] :] for name in new]
            q, k, v = torch.cat(fresh).split(SIZES, dim=1)
            self.backend.store(k, v, kv, plan)
            found = self.backend.attend(q, k, v, kv, plan)
            expected = []
            for name, start in starts.items():
                q_all, k_all, v_all = self.tokens[name][layer].split(SIZES, dim=1)
                for at in range(start, len(q_all)):
                    own = slice(0, at + 1)
                    expected.append(written_out(q_all[at], k_all[own], v_all[own], self.spec))
            torch.testing.assert_close(found.double(), torch.stack(expected).flatten(1), rtol=1e-5, atol=1e-5)
        return [bucket.cells is not None for buckets in plan.buckets.values() for bucket in buckets]

    def end(self, name: str) -> None:
        self.free += reversed(self.blocks.pop(name))  # the next to be given away are those it had last
        del self.tokens[name]


@pytest.mark.parametrize("window", [None, 11])
def test_decodes_go_on_from_step_to_step(window: int | None) -> None:
    server = Server(window)
    server.step({"a": 9, "b": 12, "c": 15})
    kept = [server.step({"a": 1, "b": 1, "c": 1}) for _ in range(30)]
    # The lengths grow through several blocks, and past the room that was left; only then is anything gathered again.
    assert kept[0] == [False]
    assert sum(all(step) for step in kept) >= 20


def test_sequences_that_come_and_go_are_not_taken_for_others() -> None:
    server = Server()
    server.step({"a": 12, "b": 12})
    assert server.step({"a": 1, "b": 1}) == [False]
    assert server.step({"a": 1, "b": 1}) == [True]
    assert server.step({"b": 1, "a": 1}) == [False]  # as long as what was in these rows
    assert server.step({"b": 1, "a": 1, "c": 10}) == [True]  # beside a prompt
    assert server.step({"b": 1, "a": 1, "c": 1}) == [False]
    server.end("b")
    server.step({"d": 17})  # with the blocks of b, and as long as b would be next
    assert server.step({"d": 1, "a": 1, "c": 1}) == [False]
    assert server.step({"d": 1, "a": 1, "c": 1}) == [True]
    server.end("c")
    assert server.step({"d": 1, "a": 1}) == [False]
    assert server.step({"d": 1, "a": 1}) == [True]


def test_nothing_is_kept_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    token = 2 * LAYERS * HEADS.num_kv_heads * HEADS.head_dim * 4
    monkeypatch.setattr(sdpa_gathering, "MOST_KEPT", 63 * token)  # two sequences of three blocks and one to grow: 64
    server = Server()
    server.step({"a": 18, "b": 20})
    assert [server.step({"a": 1, "b": 1}) for _ in range(3)] == [[False]] * 3
    server.end("b")
    assert [server.step({"a": 1}) for _ in range(3)] == [[False], [True], [True]]
