"""Time to first token, alone and beside answers that grow, with steps launched as soon as possible and late.

    python benchmarks/first_token.py --shape llama-3.1-8b [--beside 8] [--tokens 1500] [--launch soon,late] [--times]
    python benchmarks/first_token.py demo --requests 5 --tokens 200

Through client and workers, as `tpctl serve` runs them: one thread asks for one token behind a prompt of random tokens,
another takes the answers' tokens. Questions come 0.15 s apart, and up to 20 ms later, so that they meet steps anywhere.
`alone`: nothing else is computed. `beside N`: while N answers of `--tokens` tokens are; TPOT is theirs meanwhile, and
`quiet` that of as many answers without questions, which tells what late launches cost. Median, range, and how many; the
first questions of each kind, for which kernels are compiled and steps captured, are not counted. With ``--times`` the
way of a question is told in parts, by the worker's notes (``first_token_worker.py``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tpctl.bench.latencies import percentile
from tpctl.bench.measure import machine
from tpctl.bench.synthetic import shape_config, synthetic_shards
from tpctl.client.engine_client import EngineClient
from tpctl.client.prepare import EngineArgs, configure, prepare
from tpctl.errors import EngineError
from tpctl.wire.messages import Request
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.settings import EngineConfig

GAP, JITTER = 0.15, 0.02  # seconds between questions
UNCOUNTED = 6  # questions of a kind: a step that has come four times is captured
LAUNCHES = {"soon": False, "late": True}
GOLDEN = 0.618034  # multiples of it, modulo 1, are even however many there are
PARTS = ("to be heard", "taken in", "launched", "begun", "ended", "sent on", "received")


class Asked(NamedTuple):
    """A question, and when it was sent and its token came."""

    id: str
    sent: float
    received: float

    @property
    def ms(self) -> float:
        return 1e3 * (self.received - self.sent)


class Answers:
    """Answers that grow, taken by a thread of their own.

    Attributes:
        grows: set once each has a token.
        ended: set once one of them has all of its tokens.
        times: of each answer when its tokens came.
    """

    def __init__(self, client: EngineClient, requests: Sequence[Request]) -> None:
        self.grows = threading.Event()
        self.ended = threading.Event()
        self.times: dict[str, list[float]] = defaultdict(list)
        self._mailbox = client.mailbox()
        self._left = len(requests)
        self._failed: str | None = None
        self._mailbox.submit(requests)
        self._count = len(requests)
        self._thread = threading.Thread(target=self._take)
        self._thread.start()

    def per_token(self) -> list[float]:
        """Wait for the end; milliseconds a token of each answer."""
        self._thread.join()
        if self._failed is not None:
            raise EngineError(self._failed)
        return [1e3 * (times[-1] - times[0]) / (len(times) - 1) for times in self.times.values()]

    def _take(self) -> None:
        with self._mailbox:
            while self._left and self._failed is None:
                outputs, now = self._mailbox.outputs(), time.perf_counter()
                for output in outputs:
                    if output.finish_reason == "error":
                        self._failed = f"an answer failed: {output.message}"
                    self.times[output.id] += [now] * len(output.token_ids)
                    self._left -= output.finish_reason is not None
                if len(self.times) == self._count:
                    self.grows.set()
                if self._left < self._count:
                    self.ended.set()
        self.grows.set()
        self.ended.set()


class Measurement:
    """One engine's. ``prompts`` of its own give no two requests a prefix in common."""

    def __init__(self, client: EngineClient, args: argparse.Namespace, vocab_size: int) -> None:
        self._client = client
        self._args = args
        self._vocab_size = vocab_size
        self._numbers = itertools.count()
        self._random = random.Random(0)
        self._asked = 0

    def requests(self, count: int, tokens: int) -> list[Request]:
        prompts = [
            [self._random.randrange(3, self._vocab_size) for _ in range(self._args.prompt_tokens)] for _ in range(count)
        ]
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        return [Request(str(next(self._numbers)), prompt, params) for prompt in prompts]

    def ask(self, count: int | None, ended: threading.Event) -> list[Asked]:
        """Questions, one after the other: so many, or until ``ended``."""
        found: list[Asked] = []
        with self._client.mailbox() as mailbox:
            while not ended.is_set() and (count is None or len(found) < count):
                self._asked += 1
                time.sleep(GAP + JITTER * (GOLDEN * self._asked % 1))
                requests = self.requests(1, 1)
                sent = time.perf_counter()
                mailbox.submit(requests)
                outputs = mailbox.outputs()
                if not ended.is_set():
                    found.append(Asked(requests[0].id, sent, time.perf_counter()))
                if outputs[-1].finish_reason == "error":
                    raise EngineError(f"a question failed: {outputs[-1].message}")
        return found

    def alone(self) -> list[Asked]:
        return self.ask(self._args.requests + UNCOUNTED, threading.Event())[UNCOUNTED:]

    def beside(self, count: int) -> tuple[list[Asked], list[float]]:
        """Questions beside ``count`` answers, and milliseconds per token of these."""
        self.quiet(count, 20)
        found: list[Asked] = []
        per_token: list[float] = []
        asked = 0
        while len(found) < self._args.requests:
            answers = Answers(self._client, self.requests(count, self._args.tokens))
            answers.grows.wait()
            some = self.ask(None, answers.ended)
            per_token += answers.per_token()
            found += some[max(0, UNCOUNTED - asked) :]
            asked += len(some)
            if not some:
                raise SystemExit(f"answers of {self._args.tokens} tokens end before any question; ask for more")
        return found, per_token

    def quiet(self, count: int, tokens: int) -> list[float]:
        """Per token of as many answers without questions."""
        return Answers(self._client, self.requests(count, tokens)).per_token()


def told(name: str, values: Sequence[float]) -> str:
    ordered = sorted(values)
    p90 = percentile(ordered, 90)
    middle = statistics.median(ordered)
    return f"  {name:<18}{middle:8.3f} ms ({ordered[0]:.3f} to {ordered[-1]:.3f}, p90 {p90:.3f}, {len(ordered)})"


def measure(config: EngineConfig, vocab_size: int, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "times.json"
        asked: dict[str, list[Asked]] = {}
        with started(config, notes if args.times else None) as client:
            info = client.wait_ready()
            one = Measurement(client, args, vocab_size)
            print(f"launch {'late' if config.late_launch else 'soon'}: {info.device}, {info.dtype}, tp {info.tp_size}")
            asked["alone"] = one.alone()
            print(told("ttft alone", [question.ms for question in asked["alone"]]), flush=True)
            for count in args.beside:
                before = client.stats()
                asked[f"beside {count}"], per_token = one.beside(count)
                print(told(f"ttft beside {count}", [question.ms for question in asked[f"beside {count}"]]))
                print(told(f"tpot beside {count}", per_token))
                print(told(f"tpot quiet {count}", one.quiet(count, args.tokens)))
                after = client.stats()
                held, late = (getattr(after, name) - getattr(before, name) for name in ("held_steps", "late_steps"))
                print(
                    f"  of {after.steps - before.steps} steps {held} were held, {late} of these came late", flush=True
                )
        if args.times:
            show(json.loads(notes.read_text()), asked)


def started(config: EngineConfig, notes: Path | None) -> EngineClient:
    """The engine, whose worker writes ``notes`` at its end."""
    if notes is None:
        return EngineClient(config)
    here = Path(__file__).resolve().parent
    places = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"PYTHONPATH": os.pathsep.join(places), "FIRST_TOKEN_TIMES": str(notes)}
    return EngineClient(config, module="first_token_worker", env=env)


def show(notes: dict[str, Any], asked: dict[str, list[Asked]]) -> None:
    """The parts of the questions' ways, and what the steps that were held were held by."""
    times = {id.split(":", 1)[1]: values for id, values in notes["requests"].items()}
    for name, questions in asked.items():
        ways = [(one.sent, *times[one.id][:-1], one.received) for one in questions]
        waited = sorted(times[one.id][-1] for one in questions)
        print(f"{name}: {', '.join(f'{waited.count(n)} behind {n} other steps' for n in sorted(set(waited)))}")
        for at, part in enumerate(PARTS):
            print(told(part, [1e3 * (way[at + 1] - way[at]) for way in ways]))
    for name, values in zip(
        ("margin", "slack in it", "for other ranks"), zip(*notes["holds"], strict=True), strict=False
    ):
        print(told(name, [1e3 * value for value in values]))


def configured(args: argparse.Namespace, late: bool) -> tuple[EngineConfig, int]:
    engine = EngineArgs(tp=args.tp, device=args.device, max_model_len=args.max_model_len, late_launch=late)
    if args.shape is None:
        config = prepare(args.model, engine)
        vocab_size: int = json.loads((Path(config.text_dir) / "config.json").read_text())["vocab_size"]
        return config, vocab_size
    source = synthetic_shards(args.shape, args.tp or 1)
    return configure(source, engine), shape_config(args.shape).vocab_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--shape", help="random weights of this shape instead")
    parser.add_argument("--tp", type=int)
    parser.add_argument("--device")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1500, help="of each answer that grows")
    parser.add_argument("--beside", type=int, nargs="*", default=[8], help="answers that grow")
    parser.add_argument("--requests", type=int, default=24, help="questions that count, at least")
    parser.add_argument("--launch", default="soon,late")
    parser.add_argument("--times", action="store_true", help="tell the parts of a question's way")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    print(json.dumps({key: value for key, value in machine().items() if value}))
    for name in args.launch.split(",") * args.rounds:
        config, vocab_size = configured(args, LAUNCHES[name])
        measure(config, vocab_size, args)


if __name__ == "__main__":
    main()
