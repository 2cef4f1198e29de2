"""A grammar that takes long to say which tokens may come next: its own request waits, or ends, and no other."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import make_checkpoint
from tests.unit.fake_client import write_tokenizer
from tpctl.client.grammar_text import grammar_text, parser_limits
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.engine.guiding import mask_threads
from tpctl.engine.guiding.grammars import Grammars
from tpctl.engine.guiding.guides import Guides
from tpctl.engine.guiding.mask_threads import TOO_LONG, Finding, MaskThreads
from tpctl.engine.guiding.walk import Walk, Words
from tpctl.engine.scheduling.scheduled import ScheduledSequence
from tpctl.engine.scheduling.sequence import Sequence as EngineSequence
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.wire.guide import BUSY, Guide, of_schema
from tpctl.wire.messages import Abort, Add, Found, Message, Output, Request, from_wire, to_wire
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

END = 256
FAR = 30.0  # seconds after which a test that hangs fails


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("slow")
    make_checkpoint("llama3", folder / "model", vocab_size=300, eos_token_id=END, bos_token_id=298)
    write_tokenizer(folder / "model")
    for ranks in (1, 2):
        shard_checkpoint(folder / "model", folder / f"tp{ranks}", ranks)
    return {ranks: folder / f"tp{ranks}" for ranks in (1, 2)}


class Held:
    """Masks of some requests, each until it is ``let``: by the request, and how many tokens were generated before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: dict[tuple[str, int], threading.Event] = {}
        self.asked: list[tuple[str, int]] = []
        mask = Walk.mask

        def slow(walk: Walk, item: ScheduledSequence, words: Words) -> str | None:
            which = item.sequence.id, item.num_generated
            self.asked.append(which)
            if which in self.events:
                assert self.events[which].wait(FAR)
            return mask(walk, item, words)

        monkeypatch.setattr(Walk, "mask", slow)

    def hold(self, id: str, generated: int = 0) -> None:
        self.events[id, generated] = threading.Event()

    def let(self, id: str, generated: int = 0) -> None:
        if (id, generated) in self.events:
            self.events[id, generated].set()

    def let_all(self) -> None:
        for event in self.events.values():
            event.set()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(monkeypatch)
    yield held
    held.let_all()


Answers = dict[str, list[Output]]


def serve(
    folder: Path,
    ranks: int,
    requests: Sequence[Request],
    look: Callable[[Answers], Sequence[Message]] = lambda answers: (),
    **settings: Any,
) -> tuple[Answers, Engine]:
    """What becomes of requests; ``look``, called before each step with what there is, may send more messages."""

    def rank(group: TPGroup) -> tuple[Answers, Engine]:
        arrived: queue.SimpleQueue[Message] = queue.SimpleQueue()
        guides = Guides(Grammars(folder)) if group.rank == 0 else None
        if guides is not None:
            guides.may_leave_out(arrived.put)
        answers: Answers = {request.id: [] for request in requests}
        with torch.inference_mode():
            engine = Engine(
                EngineConfig(folder, ranks, kv_cache_memory=1 << 20, block_size=4, **settings), group, guides
            )
            for request in requests:
                if guides is not None and request.sampling.guide:
                    guides.open(request, guides.grammars.matcher(request.sampling.guide))
            found = engine.apply(Add(list(requests)))
            while True:
                for output in found:
                    answers[output.id].append(output)
                if all(all_ and all_[-1].finish_reason for all_ in answers.values()):
                    return answers, engine
                messages: list[Message] = []
                if group.rank == 0:
                    messages += look(answers)
                    while not arrived.empty() or not (engine.has_work or messages):
                        messages.append(arrived.get(timeout=FAR))
                text = group.broadcast_text(json.dumps([to_wire(message) for message in messages]))
                found = [output for wire in json.loads(text) for output in engine.apply(from_wire(wire))]
                found += engine.step()

    results = run_ranks(ranks, rank)
    tokens = [{id: tokens_of(outputs) for id, outputs in answers.items()} for answers, _ in results]
    assert all(one == tokens[0] for one in tokens)
    for _, engine in results:
        assert not engine.has_work
        engine.scheduler.check_integrity()
        assert engine.scheduler.blocks.num_free_slabs == engine.scheduler.blocks.num_slabs
    return results[0]


def tokens_of(outputs: Sequence[Output]) -> list[int]:
    return [id for output in outputs for id in output.token_ids]


def ended(answers: Answers, *ids: str) -> bool:
    return all(answers[id] and answers[id][-1].finish_reason for id in ids)


SLOW = SamplingParams(max_tokens=40, regex="[a-f]{6,9}", temperature=1.0, seed=5, logprobs=2)
REQUESTS = [
    Request("plain", list(range(30, 43)), SamplingParams(max_tokens=60, ignore_eos=True)),
    Request("slow", list(range(40, 51)), SLOW),
    Request("quick", list(range(50, 59)), SamplingParams(max_tokens=50, regex="[xyz]{40}")),
]


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [(1, {}), (2, {}), (1, {"enable_prefix_caching": False, "max_num_batched_tokens": 8, "max_num_seqs": 3})],
)
def test_others_go_on_while_a_mask_is_being_found(
    shards: dict[int, Path], held: Held, ranks: int, settings: dict[str, Any]
) -> None:
    """They end before it is there. Who waited gets the tokens that it would have had, and its masks are found once."""
    expected, _ = serve(shards[ranks], ranks, REQUESTS, **settings)
    held.asked.clear()
    held.hold("slow", 0)
    held.hold("slow", 3)

    def look(answers: Answers) -> Sequence[Message]:
        if len(answers["plain"]) == 8:
            assert not answers["slow"]
            held.let("slow", 0)
        if ended(answers, "plain", "quick"):
            assert not ended(answers, "slow")
            held.let("slow", 3)
        return ()

    answers, _ = serve(shards[ranks], ranks, REQUESTS, look, **settings)
    for id, outputs in answers.items():
        assert tokens_of(outputs) == tokens_of(expected[id]) and outputs[-1].finish_reason != "error"
    masks = [generated for id, generated in held.asked if id == "slow"]
    assert masks == list(range(len(tokens_of(answers["slow"]))))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_mask_that_takes_too_long_ends_its_request_and_those_like_it(
    shards: dict[int, Path], held: Held, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    monkeypatch.setattr(mask_threads, "LIMIT", 0.4)
    monkeypatch.setattr(
        mask_threads, "_taken", lambda finding: time.monotonic()
    )  # who waits takes none of the processor's
    monkeypatch.setattr(mask_threads, "affinity_cores", lambda: 2)  # one thread, which takes them in order
    held.hold("slow")
    requests = [*REQUESTS, Request("like it", [35, 36, 37], SLOW)]
    answers, engine = serve(shards[ranks], ranks, requests)
    for id in ("slow", "like it"):
        assert answers[id][-1].finish_reason == "error" and answers[id][-1].message == f"regex: {TOO_LONG}"
    assert ended(answers, "plain", "quick") and len(tokens_of(answers["plain"])) == 60
    assert engine._guides is not None
    assert engine._guides.refused(Request("later", [36], SLOW)) == f"regex: {TOO_LONG}"
    assert engine._guides.refused(REQUESTS[2]) is None and engine._guides.refused(REQUESTS[0]) is None
    assert ("like it", 0) not in held.asked


def test_who_waits_for_its_mask_can_be_given_up(shards: dict[int, Path], held: Held) -> None:
    held.hold("slow")

    def look(answers: Answers) -> Sequence[Message]:
        return [Abort(["slow"])] if len(answers["plain"]) == 5 else ()

    answers, _ = serve(shards[1], 1, REQUESTS, look)
    assert [(output.finish_reason, output.token_ids) for output in answers["slow"]] == [("abort", [])]
    assert not held.events["slow", 0].is_set()
    assert len(tokens_of(answers["plain"])) == 60 and answers["quick"][-1].finish_reason == "stop"


class FakeWalk:
    """Takes until it is ``let``."""

    hopeless = begun = False

    def __init__(self, quick: bool = False) -> None:
        self.let = threading.Event()
        self.started = threading.Event()
        if quick:
            self.let.set()

    def mask(self, item: ScheduledSequence, words: Words) -> str | None:
        self.started.set()
        assert self.let.wait(FAR)
        return None


def finding(walk: FakeWalk, grammar: str) -> Finding:
    item = ScheduledSequence(EngineSequence(grammar, [1], SamplingParams(regex="a"), 9), 0, 1, True)
    return Finding(walk, item, Guide("regex", grammar, "regex"), 2)  # type: ignore[arg-type]


def until(met: Callable[[], object]) -> None:
    deadline = time.monotonic() + FAR
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_slow_masks_take_a_bounded_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grammars that were quick still have one. A new one waits until some thread is done, but not for ever."""
    monkeypatch.setattr(mask_threads, "affinity_cores", lambda: 2)
    told: list[Message] = []
    threads = MaskThreads()
    threads.tell = told.append
    known = finding(FakeWalk(quick=True), "known")
    threads.begin(known, 1)
    assert known.done.result(FAR) is None
    slow = [finding(FakeWalk(), f"slow {number}") for number in range(mask_threads._MOST_SLOW)]
    for one in slow:
        threads.begin(one, 1)
        assert one.walk.started.wait(FAR)  # type: ignore[attr-defined]
        assert threads.leave(one)
    until(lambda: all(one.slow for one in slow))
    again, new = finding(FakeWalk(quick=True), "known"), finding(FakeWalk(quick=True), "new")
    for one in (new, again):
        threads.begin(one, 1)
    assert again.done.result(FAR) is None and threads.leave(new)
    monkeypatch.setattr(mask_threads, "_WAIT", 0.1)
    assert new.done.result(FAR) == BUSY
    monkeypatch.undo()
    later = finding(FakeWalk(quick=True), "later")
    threads.begin(later, 1)
    assert threads.leave(later)
    like = finding(FakeWalk(quick=True), "slow 0")
    threads.begin(like, 1)
    assert threads.leave(like)
    slow[0].walk.let.set()  # type: ignore[attr-defined]
    until(lambda: len(told) == 4)
    assert told[:2] == [Found("new", BUSY), Found("slow 0")] and {Found("slow 0"), Found("later")} == set(told[1:])
    assert len(told) == 4 and later.done.result(FAR) is None
    for one in slow:
        one.walk.let.set()  # type: ignore[attr-defined]
    until(lambda: len(told) == 3 + len(slow) and not threads._slow)


def test_a_grammar_that_fails_before_its_first_token_is_tried_once(shards: dict[int, Path]) -> None:
    rules = [f'r{at}: r{(at + 1) % 1600} r{at * 7 % 1600}? r{at * 5 % 1600}? | /[a-z]/ | ""' for at in range(1600)]
    hopeless = SamplingParams(max_tokens=9, grammar="\n".join(["start: r0 t*", "t: /[a-z]/", *rules]))
    answers, engine = serve(shards[1], 1, [Request("a", [31], hopeless)])
    assert engine._guides is not None and answers["a"][-1].finish_reason == "error"
    assert engine._guides.refused(Request("b", [32], hopeless)) == answers["a"][-1].message


def test_an_object_of_fields_that_may_be_absent_keeps_within_the_limits(tmp_path: Path) -> None:
    """As many as llguidance's limit of a row allows."""
    from llguidance import LLMatcher

    write_tokenizer(tmp_path)
    grammars = Grammars(tmp_path)
    grammars.suit(300, [END])
    fields: dict[str, Any] = {f"p{number}": {"type": "string"} for number in range(490)}
    schema = {"type": "object", "properties": fields, "additionalProperties": False}
    guide = SamplingParams(response_format=of_schema(schema)).guide
    assert guide is not None
    matcher = LLMatcher(grammars._make_tokenizer(), grammar_text(guide), limits=parser_limits())
    for token in [*b'{"p7": "x", "p489": ""}']:
        matcher.compute_bitmask()
        assert not matcher.is_error(), matcher.get_error()
        ids = [id for id, byte in enumerate(grammars_bytes(tmp_path)) if byte == bytes([token])]
        assert matcher.consume_token(ids[0])


def grammars_bytes(folder: Path) -> list[bytes]:
    """The bytes of each token."""
    from tpctl.client.token_bytes import TokenBytes
    from tpctl.client.tokenizer import Tokenizer

    return list(TokenBytes(Tokenizer(folder), 300).tokens)


def test_without_room_for_the_thread_that_watches_no_one_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, walk = MaskThreads(), FakeWalk()
    threads.tell = [].append
    one = finding(walk, "slow")
    threads.begin(one, 1)
    assert walk.started.wait(FAR)

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        assert not threads.leave(one)
    assert threads.leave(one)
    walk.let.set()
    assert one.done.result(FAR) is None
