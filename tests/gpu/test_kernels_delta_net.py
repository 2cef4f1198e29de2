"""Gated delta nets: each kernel against the layer in plain torch, over both layouts of projections."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from tests.gpu.assembly import assembly  # noqa: F401
from tests.gpu.here import DEVICE, INTERPRET, relative_error
from tpctl.accounting import MOST_NET_CHUNKS, net_chunk_bytes
from tpctl.kernels.delta_net import chunks as chunked
from tpctl.kernels.delta_net import step as one_step
from tpctl.kernels.delta_net.chunks import ChunkTables, chunks, gated_norm
from tpctl.kernels.delta_net.inputs import NetShape, NetState, NetWeights, Projected
from tpctl.kernels.delta_net.step import StepRows, step
from tpctl.kernels.delta_net.tables import Chunks, Group, NewTokens
from tpctl.layers.delta_net import conv, rule
from tpctl.layers.norm import rms_norm

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("assembly")]
SLOTS = 9
SHAPES = {
    "two": NetShape(2, 4, 32, 16, 4),
    "four": NetShape(1, 4, 16, 32, 4),
    "uneven": NetShape(5, 10, 8, 12, 4),  # 5 of 16 key heads, as tp 3 has them; dimensions that fill no tile
    "part": NetShape(1, 3, 16, 16, 2),
    "one": NetShape(3, 3, 12, 10, 3),
} | ({} if INTERPRET else {"qwen": NetShape(16, 32, 128, 128, 4)})
DTYPES = [torch.float32, torch.bfloat16]
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}


@dataclass
class Case:
    """A layer with random weights and states, and what is projected of T tokens."""

    shape: NetShape
    by_key_head: bool
    dtype: torch.dtype
    count: int

    def __post_init__(self) -> None:
        shape, rng = self.shape, torch.Generator().manual_seed(self.count)

        def random(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(sizes, generator=rng).to(DEVICE, dtype)

        heads, keys, group = shape.value_heads, shape.key_heads, shape.group
        dim, values = shape.key_dim, group * shape.value_dim
        width = keys * (2 * dim + 2 * values) + 2 * heads
        self.all = random(self.count, width + 3, dtype=self.dtype)
        taps = random(shape.channels, 1, shape.taps, dtype=self.dtype)
        decay = random(heads).abs() * 0.3, random(heads) - 2
        self.weights = NetWeights(conv.taps_of(taps), *decay, 1 + 0.2 * random(shape.value_dim, dtype=self.dtype), 1e-6)
        matrices = random(SLOTS, heads, dim, shape.value_dim)
        self.state = NetState(matrices, random(SLOTS, shape.taps, shape.channels, dtype=self.dtype))
        if self.by_key_head:
            each = 2 * dim + 2 * values
            starts = [0, dim, 2 * dim, 2 * dim + values, keys * each, keys * each + group]
            steps = each, each, each, 2 * group
        else:
            wide = keys * dim
            starts = [0, wide, 2 * wide, 2 * wide + keys * values, 2 * wide + 2 * keys * values]
            starts.append(starts[-1] + heads)
            steps = dim, values, values, group
        self.projected = Projected(*(self.all[:, start:] for start in starts), *steps)

    def heads(self, name: str) -> Tensor:
        """[T, heads, dim] of what is projected; [T, N] of ``b`` and ``a``."""
        shape, found = self.shape, getattr(self.projected, name)
        width, step = {
            "q": (shape.key_dim, self.projected.key_step),
            "k": (shape.key_dim, self.projected.key_step),
            "v": (shape.group * shape.value_dim, self.projected.v_step),
            "z": (shape.group * shape.value_dim, self.projected.z_step),
        }.get(name, (shape.group, self.projected.gate_step))
        parts = [found[:, key * step : key * step + width] for key in range(shape.key_heads)]
        whole = torch.cat(parts, dim=1)
        if name in "ba":
            return whole
        return whole.unflatten(1, (-1, shape.key_dim if name in "qk" else shape.value_dim))

    def sequence(self, start: int, count: int, position: int, read: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What the layer gives for some tokens of one sequence, one by one: [N, E] before the gated norm, and what its
        state then is: matrices [N, D, E], and the inputs of the convolution that mean something, the oldest first."""
        shape, before = self.shape, self.shape.taps - 1
        some = slice(start, start + count)
        mixed = torch.cat([self.heads(name).flatten(1) for name in "qkv"], dim=1)[some]
        past = mixed.new_zeros(before, shape.channels)
        matrices = torch.zeros_like(self.state.matrices[0])
        if read >= 0:
            rows = [(position - before + back) % shape.taps for back in range(before)]
            past, matrices = self.state.inputs[read, rows], self.state.matrices[read].clone()
        seen = torch.cat((past, mixed))
        out = conv.run(seen, self.weights.taps)
        keys = shape.key_heads * shape.key_dim
        q, k, v = out.split([keys, keys, shape.value_heads * shape.value_dim], dim=1)
        q_TKD, k_TKD = (rule.unit(one.unflatten(1, (shape.key_heads, -1))) for one in (q, k))
        gates = rule.gates(self.heads("a")[some], self.heads("b")[some], self.weights.dt_bias, self.weights.a_log)
        v_TNE = v.float().unflatten(1, (shape.value_heads, -1))
        tokens = rule.Tokens(q_TKD * shape.key_dim**-0.5, k_TKD, v_TNE, *gates)
        found = []
        for at in range(count):
            (given,) = rule.step(tokens.part(at, at + 1), matrices[None])
            found.append((given, matrices.clone(), seen[at + 1 : at + 1 + before]))
        return found

    def normed(self, out_TNE: Tensor, some: slice) -> Tensor:
        """[T, N * E]."""
        normed = rms_norm(out_TNE.to(self.dtype), self.weights.norm, self.weights.eps)
        return (normed.float() * F.silu(self.heads("z")[some].float())).to(self.dtype).flatten(1)

    def check_state(self, slot: int, position: int, want: tuple[Tensor, Tensor, Tensor], matrices: Tensor) -> None:
        """``slot`` holds a state in front of ``position``."""
        rows = [(position - back) % self.shape.taps for back in range(self.shape.taps - 1, 0, -1)]
        assert torch.equal(self.state.inputs[slot, rows], want[2])
        assert relative_error(matrices[slot], want[1]) < CLOSE[self.dtype]


def table(columns: list[list[int]] | list[int]) -> Tensor:
    return torch.tensor(columns, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_key_head", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_of_many_sequences(shape: str, by_key_head: bool, dtype: torch.dtype) -> None:
    """One that begins, one that goes on from another's state, one that leaves a copy, and a row that is none."""
    case = Case(SHAPES[shape], by_key_head, dtype, 5)
    rows = [(-1, 0, -1, 0), (3, 3, -1, 7), (5, 1, -1, 1), (4, 4, 2, 2), (-1, -1, -1, -1)]
    want = [case.sequence(row, 1, rows[row][3], rows[row][0])[0] for row in range(4)]
    before = NetState(*(one.clone() for one in case.state))
    out = torch.full((5, case.shape.value_heads * case.shape.value_dim), 7.0, dtype=dtype, device=DEVICE)
    columns = list(zip(*((read, write, copy, position + 1) for read, write, copy, position in rows), strict=True))
    step(case.projected, case.weights, case.state, StepRows(*map(table, columns)), case.shape, out)  # type: ignore[arg-type]
    for row, (_, write, copy, position) in enumerate(rows[:4]):
        for slot in {write, copy} - {-1}:
            case.check_state(slot, position + 1, want[row], case.state.matrices)
        some = slice(row, row + 1)
        assert relative_error(out[some], case.normed(want[row][0][None], some)) < CLOSE[dtype]
    assert not out[4].any()
    for slot in (5, 6, 7, 8):
        assert all(torch.equal(mine[slot], old[slot]) for mine, old in zip(case.state, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_key_head", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_runs_of_rows_are_steps_one_behind_the_other(shape: str, by_key_head: bool, dtype: torch.dtype) -> None:
    """One of five rows, one without, one that begins, and a row that is none; the state behind each is kept."""
    case = Case(SHAPES[shape], by_key_head, dtype, 10)
    rows = [
        *((3, 0, -1, 6), (-5, 1, -1, 7), (-4, 2, -1, 8), (-3, 4, -1, 9), (-2, 5, -1, 10)),
        *((6, 6, -1, 2), (-1, 7, 10, 0), (-3, 8, -1, 1), (-2, 9, -1, 2), (-1, -1, -1, -1)),
    ]
    state = NetState(*(torch.cat([one, torch.zeros_like(one[:2])]) for one in case.state))
    expected = NetState(*(one.clone() for one in state))
    found, wanted = torch.full((2, 10, case.shape.value_heads * case.shape.value_dim), 7.0, dtype=dtype, device=DEVICE)
    for row, (read, write, copy, position) in enumerate(rows):
        source = rows[row - 1][1] if read < -1 else read
        own = StepRows(*map(table, ([source], [write], [copy], [position + 1])))
        some = slice(row, row + 1)
        step(case.projected.rows(some), case.weights, expected, own, case.shape, wanted[some])
    columns = list(zip(*((read, write, copy, position + 1) for read, write, copy, position in rows), strict=True))
    step(case.projected, case.weights, state, StepRows(*map(table, columns)), case.shape, found, runs=True)  # type: ignore[arg-type]
    assert relative_error(found, wanted) < CLOSE[dtype] and not found[9].any()
    assert relative_error(state.matrices, expected.matrices) < CLOSE[dtype]
    for slot, position in {(write, position) for _, write, _, position in rows[:9]} | {(10, 0)}:
        behind = [at % case.shape.taps for at in range(max(0, position + 2 - case.shape.taps), position + 1)]
        assert torch.equal(state.inputs[slot, behind], expected.inputs[slot, behind]), slot
    assert torch.equal(state.matrices[3], expected.matrices[3]) and torch.equal(state.inputs[3], expected.inputs[3])


LONG = [(0, 1, 0, -1, 0, ()), (1, 3, 9, 4, 4, ()), (4, 2, 1, 6, 1, ((1, 7),)), (6, 130, 65, 5, 5, ((63, 2), (127, 3)))]
SHORT = [(2, 65, 0, -1, 0, ((64, 1),))]


@pytest.mark.parametrize("new", [SHORT, LONG], ids=["one", "four"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_key_head", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_of_several_sequences(shape: str, by_key_head: bool, dtype: torch.dtype, new: list[Any]) -> None:
    """Some begin, others go on from their own state or from another's; states are kept on the way and at the end."""
    sequences = [NewTokens(*one) for one in new]
    count = sequences[-1].first + sequences[-1].length
    case = Case(SHAPES[shape], by_key_head, dtype, count)
    want = [case.sequence(one.first, one.length, one.position, one.read) for one in sequences]
    before = NetState(*(one.clone() for one in case.state))
    out = torch.full((count, case.shape.value_heads * case.shape.value_dim), 7.0, dtype=dtype, device=DEVICE)
    made = Chunks.of(sequences)
    tables = ChunkTables(table(made.chunks), table(made.sequences), made.groups)
    chunks(case.projected, case.weights, case.state, tables, case.shape, out)
    written = set()
    for one, tokens in zip(sequences, want, strict=True):
        found = out[one.first : one.first + one.length].unflatten(1, (case.shape.value_heads, -1))
        assert relative_error(found, torch.stack([token[0] for token in tokens])) < CLOSE[dtype]
        for after, slot in (*one.keeps, (one.length, one.write)):
            case.check_state(slot, one.position + after, tokens[after - 1], case.state.matrices)
            written.add(slot)
    assert bool((out[: sequences[0].first] == 7).all())
    for slot in set(range(SLOTS)) - written:
        assert all(torch.equal(mine[slot], old[slot]) for mine, old in zip(case.state, before, strict=True))
    want_out = case.normed(out.unflatten(1, (case.shape.value_heads, -1)), slice(None))
    gated_norm(case.projected, case.weights, case.shape, out)
    assert relative_error(out, want_out) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_key_head", [False, True])
@pytest.mark.parametrize("shape", ["two", "uneven"])
def test_a_captured_step_gives_the_same_numbers(
    shape: str, by_key_head: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decodes and prompts whose rows, chunks and sequences are padded, as if each had been launched by itself: what
    pads them gets zeros, and touches no state."""
    monkeypatch.setattr(one_step, "COUNTED_PROGRAMS", 2 * SHAPES[shape].value_heads)  # some have two rows, or none
    decodes, rows = [(-1, 0, -1, 1), (3, 3, -1, 8), (4, 4, 2, 3)], 80
    prompts = [NewTokens(3, 66, 0, -1, 5, ((64, 6),)), NewTokens(69, 5, 9, 7, 7)]
    made, end = Chunks.of(prompts), 74
    outs, states = [], []
    for captured in (False, True):
        case = Case(SHAPES[shape], by_key_head, dtype, rows)
        out = torch.full((rows, case.shape.value_heads * case.shape.value_dim), 7.0, dtype=dtype, device=DEVICE)
        given = case.projected, case.weights, case.state
        columns = [list(column) for column in zip(*decodes, strict=True)]
        if captured:
            own = StepRows(*(table(column + [-1] * (rows - 3)) for column in columns))  # type: ignore[arg-type]
            starts = table([3, 69, end, end, end])
            step(*given, own, case.shape, out, count_1=starts[:1])
            of_chunks, of_sequences = torch.tensor(made.padded(8, 4), dtype=torch.int32, device=DEVICE).split([40, 20])
            group = Group(0, 8, 0, 4)
            chunks(*given, ChunkTables(of_chunks.view(5, -1), of_sequences.view(4, -1), [group]), case.shape, out)
            assert bool((out[end:] == 7).all())
            gated_norm(*given[:2], case.shape, out, starts)
            assert not out[end:].any()
        else:
            own = StepRows(*(table(column) for column in columns))  # type: ignore[arg-type]
            step(case.projected.rows(slice(3)), *given[1:], own, case.shape, out[:3])
            chunks(*given, ChunkTables(table(made.chunks), table(made.sequences), made.groups), case.shape, out)
            some = slice(3, end)
            gated_norm(case.projected.rows(some), case.weights, case.shape, out[some])
        outs.append(out[:end])
        states.append(case.state)
    assert torch.equal(*outs)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*states, strict=True))


def test_rows_that_are_counted_wait_for_the_launch_before() -> None:
    case = Case(SHAPES["two"], False, torch.float32, 1)
    one = table([0])
    with pytest.raises(ValueError, match="launched behind"):
        step(
            case.projected,
            case.weights,
            case.state,
            StepRows(one, one, one, one),
            case.shape,
            case.all,
            count_1=one,
            pdl=True,
        )


def test_what_chunks_take_between_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As memory is planned."""
    case, taken = Case(SHAPES["uneven"], False, torch.bfloat16, 66), []
    original = Tensor.new_empty
    for name in ("conv_kernel", "prepare_kernel", "scan_kernel"):
        monkeypatch.setattr(chunked, name, defaultdict(lambda: lambda *args, **more: None))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **more: taken.append(original(*args, **more)) or taken[-1])
    out = torch.zeros(66, case.shape.value_heads * case.shape.value_dim, dtype=torch.bfloat16, device=DEVICE)
    made = Chunks.of([NewTokens(0, 66, 0, -1, 3)])
    tables = ChunkTables(table(made.chunks), table(made.sequences), made.groups)
    chunks(case.projected, case.weights, case.state, tables, case.shape, out)
    assert sum(one.nbytes for one in taken) == 2 * net_chunk_bytes(*case.shape[:4], itemsize=2)


def test_equal_keys_that_nothing_decays() -> None:
    """The hardest system: every token corrects what the one before has written."""
    case = Case(NetShape(1, 1, 16, 16, 2), False, torch.float32, 64)
    case.all[:] = case.all[:1]
    case.projected.b[:, :1] = 12.0
    case.weights.a_log.fill_(-12.0)
    (want,) = [case.sequence(0, 64, 1, 3)]
    out = torch.zeros(64, 16, device=DEVICE)
    made = Chunks.of([NewTokens(0, 64, 1, 3, 3)])
    tables = ChunkTables(table(made.chunks), table(made.sequences), made.groups)
    chunks(case.projected, case.weights, case.state, tables, case.shape, out)
    assert relative_error(out, torch.cat([token[0] for token in want])) < 1e-4


def test_sequences_are_grouped() -> None:
    """As many as are computed at once; one that is longer is computed by itself."""
    made = Chunks.of([NewTokens(0, 64 * n, 0, -1, 0) for n in (100, MOST_NET_CHUNKS - 100, 1, MOST_NET_CHUNKS + 1, 1)])
    assert [group.sequences for group in made.groups] == [2, 1, 1, 1]
    assert [group.chunks for group in made.groups] == [MOST_NET_CHUNKS, 1, MOST_NET_CHUNKS + 1, 1]
    assert [group.chunk for group in made.groups] == [0, MOST_NET_CHUNKS, MOST_NET_CHUNKS + 1, 2 * MOST_NET_CHUNKS + 2]
