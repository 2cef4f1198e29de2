"""What the host packs for a captured step of decodes and prompts is what the step reads."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.here import DEVICE
from tpctl.accounting import most_state_chunks
from tpctl.engine.sampling.noise import seed_state
from tpctl.engine.sampling.path import SamplingPath
from tpctl.engine.scheduling.pacing import Pace
from tpctl.engine.scheduling.scheduled import ScheduledBatch, ScheduledSequence, StateUse
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.engine.steps.graphs import CapturedSteps, DecodeGraphs, ladder
from tpctl.engine.steps.mixed import MixedGraphs, MixedInputs
from tpctl.engine.steps.slots import Slots
from tpctl.engine.steps.states import StepStates, count_chunks
from tpctl.kernels.delta_net.tables import Chunks, NewTokens
from tpctl.kernels.sampling.floors import MAX_TOP_K, Filters
from tpctl.kernels.sampling.prepare import DecodeInputs, SlotTables, prepare_decode, prepare_decode_reference
from tpctl.layers.attention.base import Place
from tpctl.wire.sampling import SamplingParams

pytestmark = pytest.mark.gpu
DIRECT, TWO_FLOORS = SamplingPath.DIRECT, SamplingPath.TWO_FLOORS
PACE = Pace(rows=32, limit=64, chunks=4)
BLOCK, POOLS = 16, 2


class Uncaptured(CapturedSteps):
    """Runs a step where ``CapturedSteps`` would replay it."""

    def __init__(self) -> None:
        self.keys: list[Hashable] = []
        # As another step has left them.
        self._numbers = torch.full((MixedGraphs.most_numbers(PACE.limit, states=True),), 7, dtype=torch.int32)
        self._numbers = self._numbers.to(DEVICE)
        self._rows = DecodeInputs.allocate(PACE.limit, SlotTables.allocate(1, 8, DEVICE, POOLS))
        for name, value in vars(self._rows).items():
            for tensor in value if name == "filters" else [value]:
                tensor.fill_(3)

    def run(
        self, key: Hashable, numbers: list[int], make: Callable[[], tuple[torch.Tensor, Callable[[], None]]]
    ) -> None:
        self.keys.append(key)
        decodes = key[0] != "mixed"  # type: ignore[index]
        stateful = not decodes and key[2] > 0  # type: ignore[index]
        assert len(numbers) <= MixedGraphs.most_numbers(PACE.limit, PACE.chunks, states=decodes or stateful)
        target, step = make()
        assert target.shape == (len(numbers),)
        rows = key[1] if isinstance(key, tuple) and key[0] == "mixed" else key[0]  # type: ignore[index]
        assert target[:rows].tolist() == [-1] * rows  # to warm up there are no rows but padding
        end = len(target) - (decodes and key[2])  # type: ignore[index]
        states = slice(3 * rows if decodes or stateful else end, 6 * rows if stateful else end)
        assert not target[rows : states.start].any() and (target[states] == -1).all()
        assert not target[states.stop :].any()
        target.copy_(torch.tensor(numbers, dtype=torch.int32))
        step()


def test_packed_rows() -> None:
    seen: list[MixedInputs] = []
    steps = Uncaptured()
    graphs = MixedGraphs(steps, PACE, lambda inputs, path: seen.append(inputs))
    # Two decodes, a chunk of 5 tokens behind 30 that ends its prompt, one of 20 that does not, 5 rows of padding.
    slots, positions = [3, 7, *[1] * 5, *[2] * 20], [40, 9, *range(30, 35), *range(20)]
    tokens = [-1, 11, *range(100, 105), *range(200, 220)]
    graphs.run(slots, positions, tokens, 2, [5, 20], [0, 1, 6])
    assert steps.keys == [("mixed", 32, 0, 32, DIRECT)]

    (inputs,) = seen
    assert inputs.num_decodes.tolist() == [2]
    assert inputs.query_start_P1.tolist() == [2, 7, 27, 27, 27]
    assert inputs.seq_lens_P.tolist() == [35, 20, 0, 0]
    assert inputs.logits_rows.tolist() == [0, 1, 6, *[31] * 29]
    tables = SlotTables.allocate(10, 8, DEVICE, POOLS)
    tables.block_tables.copy_(torch.arange(1, 81 + 80 * (POOLS - 1)).view(POOLS, 10, 8))
    for last, read in ((99, 99), (-2, 0)):  # a row that has failed is read as a token that there is
        sampled = torch.tensor([last, 98], device=DEVICE)
        prepare_decode(inputs.rows, sampled, tables, BLOCK)
        assert inputs.rows.input_ids[:27].tolist() == [read, *tokens[1:]]
    for pool in range(POOLS):
        slots_T, first = inputs.rows.slot_mapping[pool], 80 * pool + 9
        assert slots_T[27:].tolist() == [-1] * 5
        assert slots_T[2:7].tolist() == [(first + at // BLOCK) * BLOCK + at % BLOCK for at in range(30, 35)]
        # The last row of a chunk has all of its blocks.
        chosen = inputs.rows.block_tables[pool, inputs.last_row_P.long()]
        assert chosen[0, :3].tolist() == [first, first + 1, first + 2]
        assert chosen[1, :2].tolist() == [first + 8, first + 9]


def test_what_a_slot_holds_is_sent_when_it_is_taken() -> None:
    slots = Slots(3, 8, torch.device(DEVICE), (Place(), Place()))
    assert slots.tables.filters.top_p.tolist() == [1] * 3
    sent: list[int] = []
    send = slots._send

    def counted(host: torch.Tensor) -> torch.Tensor:
        sent.append(host.numel())
        return send(host)

    slots._send = counted  # type: ignore[method-assign]
    params = [
        SamplingParams(temperature=0.7, top_k=2**31 - 1, top_p=0.25, min_p=0.125, seed=2**63 - 1),
        SamplingParams(temperature=1e4, top_k=5, seed=3),
    ]
    items = []
    for number, one in enumerate(params):
        sequence = Sequence(str(number), [1] * 20, one, 99)
        sequence.rope_offset = 40 * number
        sequence.block_tables = [[5 + number, 6], [7, 8 + number]]
        sequence.num_slots = 32
        items.append(ScheduledSequence(sequence, 0, 20, True))
    places = slots.update(items)
    tables = slots.tables
    assert tables.filters.temperature[places].tolist() == torch.tensor([0.7, 1e4]).tolist()
    assert tables.filters.top_k[places].tolist() == [MAX_TOP_K, 5]
    assert tables.filters.top_p[places].tolist() == [0.25, 1]
    assert tables.filters.min_p[places].tolist() == [0.125, 0]
    assert tables.rope_offset[places].tolist() == [0, 40]
    assert [number % 2**64 for number in tables.seed_hash[places].tolist()] == [seed_state(p.seed) for p in params]
    assert tables.block_tables[:, places, :2].tolist() == [[[5, 6], [6, 6]], [[7, 8], [7, 9]]]
    assert not tables.block_tables[:, places, 2:].any() and tables.block_tables.is_contiguous()
    assert slots.update(items) == places and len(sent) == 1, "once, in one copy"
    items[1].sequence.block_tables[0].append(9)
    items[1].sequence.num_slots = 48
    slots.update(items)
    assert tables.block_tables[0, places[1], :3].tolist() == [6, 6, 9] and sent[1:] == [2]


def test_packed_states() -> None:
    """Of one decode, of a chunk that leaves a state on its way and of one that goes on; the rest touches none."""
    seen: list[MixedInputs] = []
    steps = Uncaptured()
    graphs = MixedGraphs(steps, PACE, lambda inputs, path: seen.append(inputs), states=True)
    slots, positions, tokens = [3, *[1] * 20, *[2] * 5], [40, *range(20), *range(30, 35)], [9] * 26
    chunks = Chunks.of([NewTokens(1, 20, 0, -1, 6, ((16, 8),)), NewTokens(21, 5, 30, 7, 7)])
    states = StepStates([[4], [5], [-1]], chunks)
    graphs.run(slots, positions, tokens, 1, [20, 5], [0, 25], states=states)
    assert steps.keys == [("mixed", 32, 8, 32, DIRECT)]
    (inputs,) = seen
    assert inputs.rows.packed[3:].tolist() == [[own, *[-1] * 31] for own in (4, 5, -1)]
    assert inputs.query_start_P1.tolist() == [1, 21, 26, 26, 26]
    assert inputs.state_chunks is not None and inputs.state_sequences is not None
    of_chunks = [[1, 17, 21], [16, 4, 5], [0, 16, 30], [8, -1, -1], [0, 0, 1]]
    assert inputs.state_chunks.view(5, -1).tolist() == [column + [0] * 5 for column in of_chunks]
    of_sequences = [[0, 2, 3, 3, 3], [1, 21, 0, 0, 0], [-1, 7, -1, -1, -1], [6, 7, -1, -1, -1]]
    assert inputs.state_sequences.view(4, -1).tolist() == of_sequences


def test_steps_with_states_are_captured_by_their_chunks() -> None:
    """Where states are kept on the way there are more of them than of 64 tokens each."""
    graphs = MixedGraphs(Uncaptured(), PACE, lambda inputs, path: None, states=True)

    def chunk(tokens: int, *keeps: int) -> ScheduledSequence:
        use = StateUse(0, None, tuple((after, 1 + at) for at, after in enumerate(keeps)))
        return ScheduledSequence(Sequence("s", [1] * tokens, SamplingParams(), 99), 0, tokens, True, use)

    for items, chunks in (([chunk(20)], 1), ([chunk(60, 16, 60), chunk(4)], 3), ([chunk(64, 5, 9, 30)], 4)):
        made = ScheduledBatch(items, 0, True)
        assert count_chunks(items) == chunks == StepStates.of(made).chunks.count
        assert graphs.meet(made)
    assert most_state_chunks(PACE.limit, PACE.chunks) == 13
    assert not graphs.meet(ScheduledBatch([chunk(50, *range(1, 14))], 0, True))


def test_sizes_that_are_captured() -> None:
    assert ladder(6) == [1, 2, 4, 6] and ladder(80)[-3:] == [48, 64, 80]
    assert ladder(512) == [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512]


def test_decodes_are_padded_to_the_ladder() -> None:
    seen: list[tuple[DecodeInputs, bool, SamplingPath, torch.Tensor | None]] = []
    steps = Uncaptured()
    graphs = DecodeGraphs(steps, 12, lambda *given: seen.append(given))
    assert graphs.sizes == [1, 2, 4, 8, 12]
    graphs.run([[5, 3, 9], [40, 9, 0], [-1, 11, 12]], True, TWO_FLOORS)
    ((inputs, long, path, shared),) = seen
    assert (steps.keys, long, path, shared) == ([(4, True, False, TWO_FLOORS)], True, TWO_FLOORS, None)
    assert inputs.packed.tolist() == [[5, 3, 9, -1], [40, 9, 0, 0], [-1, 11, 12, 0]]
    assert (inputs.block_tables.shape, inputs.keys.shape, inputs.seq_lens.shape) == ((POOLS, 4, 8), (4, 2), (4,))
    assert all(table.is_contiguous() for table in inputs.block_tables)
    graphs.run([[5, 5, 5], [40] * 3, [9] * 3, [6] * 3, [7] * 3, [8] * 3])  # with where states are
    assert seen[1][0].packed[3:].tolist() == [[6, 6, 6, -1], [7, 7, 7, -1], [8, 8, 8, -1]]
    graphs.run([[5, 3, 9], [40, 39, 50], [-1, 11, 12]], shared=32)
    assert steps.keys[-1] == (4, False, True, DIRECT)
    assert seen[-1][3] is not None and seen[-1][3].tolist() == [32]


def batch(decodes: int, chunks: list[int], *, paced: bool = True) -> ScheduledBatch:
    def item(tokens: int) -> ScheduledSequence:
        return ScheduledSequence(Sequence("s", [1] * tokens, SamplingParams(), 99), 0, tokens, tokens == 1)

    return ScheduledBatch([item(1)] * decodes + [item(tokens) for tokens in chunks], decodes, paced)


@pytest.mark.always
@pytest.mark.parametrize(
    "decodes,chunks,taken",
    [
        (10, [6], True),
        (10, [5], False),  # less than half of the rows
        (10, [54], True),
        (10, [55], False),  # more than the limit
        (20, [], False),  # decodes have graphs of their own
        (10, [5] * 4, True),
        (10, [5] * 5, False),
    ],
)
def test_what_is_captured(decodes: int, chunks: list[int], taken: bool) -> None:
    graphs = MixedGraphs(Uncaptured(), PACE, lambda inputs, path: None)
    assert graphs.meet(batch(decodes, chunks)) is taken


def test_short_steps_are_captured_when_they_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[Hashable] = []
    monkeypatch.setattr(Uncaptured, "prepare", lambda self, key, make: captured.append(key))
    graphs = MixedGraphs(Uncaptured(), None, lambda inputs, path: None, 512)

    def takes(decodes: int, *chunks: int) -> bool:
        return graphs.meet(batch(decodes, list(chunks), paced=False))

    assert not takes(0, 128) and not takes(0, 120) and not takes(0, 129) and not takes(0, 513)
    assert graphs.capture_missed()  # one at a time, the one that came most often first
    assert captured == [("mixed", 128, 0, 64, DIRECT)]
    assert not graphs.capture_missed()
    assert captured[1:] == [("mixed", 160, 0, 64, DIRECT)]
    assert takes(0, 128) and takes(1, 100, 20) and takes(30, 99)
    assert not takes(0, 17)  # another size
    assert not takes(70, 58)  # more rows are sampled
    assert not takes(0, *[10] * 9)  # more chunks than a graph has
    assert [takes(0, 300) for _ in range(5)] == [False, False, False, True, True]  # there is no time to wait for
    while graphs.capture_missed():
        pass
    assert len(captured) == 4 + 1 and len(set(captured)) == 5


def test_no_graph_has_more_rows_than_there_is_memory_for() -> None:
    seen: list[MixedInputs] = []
    steps = Uncaptured()
    graphs = MixedGraphs(steps, None, lambda inputs, path: seen.append(inputs), 60)
    graphs.run([1] * 59, [*range(59)], [5] * 59, 0, [59], [58], paced=False)
    assert steps.keys == [("mixed", 60, 0, 60, DIRECT)]
    assert seen[0].rows.packed[0].tolist() == [1] * 59 + [-1]


def test_prepared_rows_equal_their_reference() -> None:
    torch.manual_seed(0)
    rows, slots, blocks = 23, 6, 9
    tables = SlotTables(
        torch.randint(1, 99, (POOLS, slots, blocks), dtype=torch.int32, device=DEVICE),
        torch.randint(-(2**63), 2**63 - 1, (slots,), device=DEVICE),
        Filters(
            torch.rand(slots, device=DEVICE),
            torch.randint(0, 50, (slots,), dtype=torch.int32, device=DEVICE),
            torch.rand(slots, device=DEVICE),
            torch.rand(slots, device=DEVICE),
        ),
        torch.randint(0, 5, (slots,), dtype=torch.int32, device=DEVICE),
    )
    sampled = torch.arange(1000, 1000 + rows, device=DEVICE)
    packed = torch.stack(
        [
            torch.randint(-1, slots, (rows,)),
            torch.randint(0, blocks * BLOCK, (rows,)),
            torch.randint(-rows, 99, (rows,)),
        ]
    ).int()
    live = packed[0] >= 0
    assert 0 < int(live.sum()) < rows
    packed[1:, ~live] = 0
    got, want = (DecodeInputs.allocate(rows, tables) for _ in range(2))
    for inputs, prepare in ((got, prepare_decode), (want, prepare_decode_reference)):
        inputs.packed.copy_(packed)
        prepare(inputs, sampled, tables, BLOCK)
    for name in ("input_ids", "rope_positions", "seq_lens", "keys"):
        assert torch.equal(getattr(got, name)[live], getattr(want, name)[live]), name
    for name in ("slot_mapping", "block_tables"):
        assert torch.equal(getattr(got, name)[:, live], getattr(want, name)[:, live]), name
    for name, mine, theirs in zip(Filters._fields, got.filters, want.filters, strict=True):
        assert torch.equal(mine, theirs), name
    assert not got.filters.temperature[~live].any()  # padding is greedy
    for name in ("slot_mapping", "seq_lens"):  # what keeps padding from doing anything
        assert torch.equal(getattr(got, name), getattr(want, name)), name
