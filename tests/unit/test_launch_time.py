"""When steps are launched, by a clock that only the test moves: real scheduler, engine and loop, a device that takes as
long as it is told."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, product
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace

import pytest

from tpctl.distributed import TPGroup
from tpctl.engine import engine as engine_module
from tpctl.engine.engine import Engine
from tpctl.engine.feed import ARRIVAL
from tpctl.engine.launch_time import LaunchTime
from tpctl.engine.runners.runner import Launched
from tpctl.engine.scheduling.scheduled import ScheduledBatch
from tpctl.engine.worker import serve
from tpctl.wire.messages import Add, Message, Outputs, Request, Stop
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

MS = 1e-3
STEP, PROMPT, WORK = 4 * MS, 6 * MS, 0.3 * MS
"""What a step of decodes takes, one with a prompt, and the host's work before a launch."""


@dataclass
class Running(Launched):
    ends: float = 0.0


@dataclass
class Machine:
    """A device and its host.

    Attributes:
        takes: seconds of a step; ``work``: of the host before one is launched, and ``prompt_work`` for a prompt.
        sees: seconds until the host sees that a step has ended.
        behind: seconds by which another rank starts a step later than rank 0 launches it.
        now: the time. idle: seconds that the device had nothing to do, after the first step.
        steps: what each step computed, and when it began.
    """

    takes: Callable[[ScheduledBatch], float] = lambda batch: PROMPT if batch.num_prefills else STEP
    work: Callable[[], float] = lambda: WORK
    prompt_work: float = 0.0
    sees: Callable[[], float] = lambda: 0.02 * MS
    behind: float = 0.0
    now: float = 100.0
    idle: float = 0.0
    steps: list[tuple[ScheduledBatch, float]] = field(default_factory=list)
    free: float = 0.0
    drafts = False
    speculation = pace = None
    loaded = SimpleNamespace(config=SimpleNamespace(vocab_size=1000, eos_token_ids=()))
    memory = SimpleNamespace(num_blocks=4096, layout=None, max_model_len=4096, context_full=None, num_states=0)
    backend = SimpleNamespace(block_size=16)

    def __post_init__(self) -> None:
        self.masks = SimpleNamespace()

    def launch(self, batch: ScheduledBatch) -> Launched:
        self.now += self.work() + self.prompt_work * batch.num_prefills
        begins = max(self.now + self.behind, self.free)
        if self.steps:
            self.idle += begins - self.free
        self.steps.append((batch, begins))
        self.free = begins + self.takes(batch)
        return Running(batch, [5] * batch.num_sampled, launched_at=self.now, ends=self.free)

    def collect(self, launched: Launched) -> tuple[list[int], None]:
        assert isinstance(launched, Running)
        launched.ended_at = self.now = max(self.now, launched.ends) + self.sees()
        return launched.token_ids, None

    def may_overlap(self, batch: ScheduledBatch) -> bool:
        return True

    def rest(self) -> bool:
        return False

    def device_memory(self) -> int:
        return 0

    reserved_memory = device_memory

    def rope_offset(self, tokens: int) -> int:
        return 0


@dataclass
class Feed:
    """Requests by the time at which they come, and Stop once there is nothing else."""

    machine: Machine
    coming: list[tuple[float, Request]]
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    waited: float = 0.0

    def next(self, wait: bool, patience: float = 0.0) -> list[Message]:
        machine = self.machine
        begun = machine.now
        if wait:
            if not self.coming:
                return [Stop()]
            machine.now = max(machine.now, self.coming[0][0])
        elif patience > 0:
            wakes = machine.now + patience + 0.05 * MS  # a timer is late
            if self.coming and self.coming[0][0] < wakes:
                wakes = max(self.coming[0][0], wakes - ARRIVAL)
            machine.now = wakes
            self.waited += machine.now - begun
        here = [request for time, request in self.coming if time <= machine.now]
        self.coming = self.coming[len(here) :]
        return [Add(here)] if here else []

    def send(self, message: Message) -> None:
        assert isinstance(message, Outputs)
        for output in message.outputs:
            if output.token_ids:
                self.first.setdefault(output.id, self.machine.now)
                self.last[output.id] = self.machine.now


def ask(name: str, tokens: int = 1, length: int = 20) -> Request:
    prompt = [random.Random(name).randrange(3, 1000) for _ in range(length)]
    return Request(name, prompt, SamplingParams(max_tokens=tokens, ignore_eos=True))


Run = Callable[..., tuple[Feed, Engine]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Answer requests: ``answers`` of so many ``tokens`` each, and others, each with the time at which it comes."""

    def run(
        machine: Machine,
        others: Sequence[tuple[float, Request]] = (),
        answers: int = 8,
        tokens: int = 200,
        late_launch: bool = True,
    ) -> tuple[Feed, Engine]:
        monkeypatch.setattr(engine_module, "make_runner", lambda config, group, compiled: machine)
        monkeypatch.setattr(engine_module, "LaunchTime", lambda allowance: LaunchTime(allowance, lambda: machine.now))
        engine = Engine(EngineConfig(Path(), 1, late_launch=late_launch), TPGroup(0, 1, "cpu"))
        coming = [(machine.now, ask(f"answer {number}", tokens)) for number in range(answers)]
        feed = Feed(machine, sorted([*coming, *others], key=lambda pair: pair[0]))
        serve(engine, feed)  # type: ignore[arg-type]
        assert len(feed.first) == answers + len(others)
        engine.stats()  # checks the books
        return feed, engine

    return run


def skipped(machine: Machine, name: str, came: float) -> int:
    """How many steps begin between a request's coming and its first one."""
    return sum(came < begun for _, begun in machine.steps[: first_step(machine, name)])


def first_step(machine: Machine, name: str) -> int:
    """The number of the first step that computes some of a request."""
    return next(at for at, (batch, _) in enumerate(machine.steps) if any(i.sequence.id == name for i in batch.items))


def test_what_comes_during_a_step_is_in_the_next_one(run: Run) -> None:
    chance = random.Random(0)
    times = list(accumulate((STEP * chance.uniform(8, 12) for _ in range(59)), initial=100.1))
    waited: dict[bool, list[float]] = {}
    steps: dict[bool, list[int]] = {}
    for late in (False, True):
        machine = Machine()
        others = [(time, ask(str(number))) for number, time in enumerate(times)]
        feed, engine = run(machine, others, tokens=800, late_launch=late)
        waited[late] = [feed.first[str(number)] - time for number, time in enumerate(times)]
        steps[late] = [skipped(machine, str(number), time) for number, time in enumerate(times)]
        assert machine.idle == 0 == engine.stats().late_steps
    assert steps[False].count(1) >= 55, "it is launched already"
    assert steps[True].count(0) >= 48, "all but those that come while a step is being launched, or at once"
    assert median(waited[True]) < median(waited[False]) - 0.8 * STEP


def test_a_burst_is_in_one_step(run: Run) -> None:
    """Not its first request in the next step, and the others behind the prompt of that one."""
    chance = random.Random(0)
    times = list(accumulate((STEP * chance.uniform(20, 22) for _ in range(20)), initial=100.1))
    machine = Machine()
    others = [
        (time + STEP * 0.3 * number / 8, ask(f"{burst} {number}"))
        for burst, time in enumerate(times)
        for number in range(8)
    ]
    feed, _ = run(machine, others, tokens=800)
    apart = [len({first_step(machine, f"{burst} {number}") for number in range(8)}) for burst in range(len(times))]
    assert apart.count(1) >= 14, "but where a step is launched meanwhile"
    assert median(feed.first[request.id] - time for time, request in others) < 2.5 * STEP


def test_first_tokens_beside_answers_as_on_an_h200(run: Run) -> None:
    """Llama-8B beside 8 answers: steps of 4.55 ms, 5.75 with a question, which come every 34th to 38th step. The host
    sees ends a little late and is never as regular as the device. Messages, half a millisecond, would come on top."""
    waited: dict[bool, list[float]] = {False: [], True: []}
    for late, seed in product((False, True), range(3)):
        chance = random.Random(seed)
        machine = Machine(
            lambda batch, chance=chance: (5.75 if batch.num_prefills else 4.55) * MS * chance.gauss(1, 0.002),  # type: ignore[misc]
            lambda chance=chance: 0.45 * MS * (1 + chance.expovariate(10)),  # type: ignore[misc]
            prompt_work=0.35 * MS,
            sees=lambda chance=chance: 0.05 * MS * chance.expovariate(1),  # type: ignore[misc]
        )
        times = [100.1 + 0.165 * number + 0.02 * (0.618 * number % 1) for number in range(40)]
        others = [(time, ask(str(number), length=128)) for number, time in enumerate(times)]
        feed, engine = run(machine, others, tokens=1500, late_launch=late)
        waited[late] += [feed.first[str(number)] - time for number, time in enumerate(times)]
        assert machine.idle < 5e-4 * (machine.now - 100)
        assert not late or engine.stats().held_steps > 1250
    for late, all_waited in waited.items():
        print("late" if late else "soon", *(f"{1e3 * time:.1f}" for time in quantiles(all_waited, n=20)), "ms")
    step, own, margin = 4.55 * MS, 5.75 * MS, 0.45 * MS + 0.6 * MS
    assert median(waited[False]) == pytest.approx(1.5 * step + own, abs=0.4 * MS)
    # Those that come in the margin wait longest, for what is left of it and one more step.
    assert median(waited[True]) < margin + 0.5 * step + own + 0.2 * MS
    assert quantiles(waited[True], n=10)[-1] < step + own + margin


def test_the_border_is_where_the_next_step_is_due(run: Run) -> None:
    """Of two requests the one that comes half a millisecond before the end is late for the next step."""
    plain = Machine()
    run(plain)
    ends = plain.steps[41][1]
    for before, steps in ((0.45 * MS, 1), (0.7 * MS, 0)):
        machine = Machine()
        run(machine, [(ends - before, ask("one"))])
        assert skipped(machine, "one", ends - before) == steps


def test_nothing_is_lost_by_waiting(run: Run) -> None:
    """Times as they are on a machine: the host's work and the steps vary, and the device has hardly a pause."""
    ends = []
    for late in (False, True):
        chance = random.Random(0)
        machine = Machine(
            lambda batch, chance=chance: STEP * chance.uniform(0.99, 1.03),  # type: ignore[misc]
            lambda chance=chance: WORK * chance.choice([0.8, 1, 1, 1, 1.4]),  # type: ignore[misc]
        )
        _, engine = run(machine, tokens=1500, late_launch=late)
        ends.append(machine.now)
        assert machine.idle < 1e-3 * (machine.now - 100)
    assert engine.stats().held_steps > 1300
    assert ends[1] == pytest.approx(ends[0], rel=0.01)


def test_steps_that_are_launched_to_find_out_become_rare(run: Run) -> None:
    """What comes during one waits for one more."""
    _, engine = run(Machine(), tokens=1500)
    assert 1500 - engine.stats().held_steps < 20


def test_steps_that_become_shorter_cost_one_pause(run: Run) -> None:
    machine = Machine()
    machine.takes = lambda batch: 2 * STEP if len(machine.steps) < 100 else STEP
    _, engine = run(machine)
    assert 0 < machine.idle < STEP
    assert engine.stats().late_steps == 1
    assert engine.stats().held_steps > 150, "what they take now is found out"


def test_steps_that_become_longer_are_soon_waited_for(run: Run) -> None:
    machine = Machine()
    machine.takes = lambda batch: STEP if len(machine.steps) < 50 else 2 * STEP
    came = 100 + 50 * STEP + 100 * 2 * STEP
    run(machine, [(came + 0.6 * STEP, ask("one"))])
    assert machine.idle == 0
    assert skipped(machine, "one", came + 0.6 * STEP) == 0


def test_the_first_steps_of_another_size_are_launched_at_once(run: Run) -> None:
    """Nothing is known of them: half of the answers end, and steps of the others take half of the time."""
    machine = Machine(lambda batch: STEP if len(batch.items) > 4 else STEP / 2)
    run(machine, [(100, ask(f"long {number}", 200)) for number in range(4)], answers=4, tokens=60)
    assert machine.idle < WORK, "one at most: the step that is scheduled as the answers end"


def test_what_steps_took_before_a_rest_is_forgotten(run: Run) -> None:
    machine = Machine()
    machine.takes = lambda batch: 2 * STEP if machine.now < 102 else STEP
    run(machine, [(103, ask(f"later {number}", 50)) for number in range(8)], tokens=100)
    begun = [begun for _, begun in machine.steps if begun > 103]
    assert [b - a for a, b in pairwise(begun)] == pytest.approx([STEP] * (len(begun) - 1))


def test_what_steps_of_another_size_took_long_ago_is_forgotten(run: Run) -> None:
    machine = Machine()
    machine.takes = lambda batch: 2 * STEP if len(batch.items) == 8 and len(machine.steps) < 60 else STEP
    run(machine, [(100.3, ask(f"beside {number}", 60)) for number in range(8)], tokens=200)
    sizes = [len(batch.items) for batch, _ in machine.steps]
    assert sizes[30] == sizes[150] == 8 < sizes[60]
    assert machine.idle < WORK


def test_steps_that_a_request_has_hurried_say_nothing_of_the_hosts_work() -> None:
    """Of which nobody knows when it began."""
    now, times = 0.0, LaunchTime(clock=lambda: now)
    running, before = Launched(ScheduledBatch([], 0), [], launched_at=0.0), None
    left = []
    for _ in range(60):
        left.append(times.left(running, before))
        hurried = left[-1] > 0
        before, running = running, Launched(running.batch, [], launched_at=now + (1 * MS if hurried else WORK))
        before.ended_at = now = now + STEP
    assert left == pytest.approx([0] * 3 + [STEP - WORK - 0.2 * MS] * 57)


@pytest.mark.parametrize(("step", "work"), [(1.2 * MS, WORK), (STEP, 1.1 * STEP), (STEP, 0.8 * STEP)])
def test_short_steps_and_busy_hosts_are_not_waited_for(run: Run, step: float, work: float) -> None:
    machine = Machine(lambda batch: step, lambda: work)
    feed, engine = run(machine)
    assert engine.stats().held_steps == 0 == feed.waited


@pytest.mark.parametrize("behind", (0.5, 0.8, 1.3))
def test_another_rank_that_is_late_is_told_earlier(run: Run, behind: float) -> None:
    """All that rank 0 sees of it are longer steps: after a round or two of them it knows."""
    machine = Machine(behind=behind * MS)
    _, engine = run(machine, tokens=3000)
    assert engine.stats().held_steps > 2000 and engine.stats().late_steps == 0
    assert machine.idle < 0.01 * (machine.now - 100)
    lengths = [b - a for (_, a), (_, b) in pairwise(machine.steps)]
    assert max(lengths[1:-1]) < STEP + machine.behind


def test_a_host_that_stutters_is_given_more_time(run: Run) -> None:
    chance = random.Random(1)
    machine = Machine(work=lambda: WORK + (2 * MS if chance.random() < 0.05 else 0))
    _, engine = run(machine, tokens=2000)
    stats = engine.stats()
    assert 0 < stats.late_steps < 0.03 * stats.held_steps
    assert machine.idle < 0.01 * (machine.now - 100)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_steps_take_all_is_answered(run: Run, seed: int) -> None:
    chance = random.Random(seed)
    machine = Machine(lambda batch: chance.expovariate(1 / STEP), lambda: chance.expovariate(1 / WORK))
    others = [(100 + chance.uniform(0, 3), ask(str(number), chance.randrange(1, 50))) for number in range(50)]
    late = run(machine, others, tokens=500)[0]
    assert late.waited < machine.now - 100
