"""What speculation gains, and that it changes nothing: answers of one model with it and without, in turns.

    python benchmarks/speculation_bench.py demo [--counts 1,2,4,8] [--runs 5] [--dtype float32]
    python benchmarks/speculation_bench.py demo --check 200 --dtype float32

Texts of four kinds: code that is written again with a change and passages that are summed up, which repeat their
prompt; questions and stories, which do not. Both engines are there from the beginning, and every set of requests is
answered by the one and then by the other, so that a busy machine slows both. Tokens a second are given by the clock and
by the processor time of the engine's processes, which a busy machine disturbs less. ``--check`` compares the tokens of
so many prompts of all kinds.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

from tpctl.bench.measure import machine
from tpctl.bench.passage import PASSAGE
from tpctl.client.llm import LLM
from tpctl.client.tokenizer import Tokenizer
from tpctl.wire.messages import Request
from tpctl.wire.sampling import SamplingParams

FUNCTIONS: tuple[Callable[..., Any], ...] = (
    textwrap.dedent,
    textwrap.indent,
    statistics.median,
    statistics.median_low,
    statistics.mode,
    statistics.multimode,
    inspect.indentsize,
    inspect.getmodulename,
    inspect.cleandoc,
    inspect.getdoc,
)
CHANGES = ("with type hints", "with a comment on each line", "with shorter names", "with a check of its arguments")
ASKED = ("Sum up", "Correct the spelling of", "Translate into simple English, and quote,", "List all names in")
QUESTIONS = (
    "Why is the sky blue?",
    "How does a bicycle stay upright?",
    "What is a prime number?",
    "Who was Ada Lovelace?",
)
STORIES = ("a lighthouse", "two brothers and a map", "a very old clock", "the last train", "a garden in winter")


def code(tokenizer: Tokenizer) -> Iterator[list[int]]:
    for number in count():
        function, change = FUNCTIONS[number % len(FUNCTIONS)], CHANGES[number // len(FUNCTIONS) % len(CHANGES)]
        source = inspect.getsource(function)
        begun = source.splitlines()[0]
        yield tokenizer.encode(f"```python\n{source}```\n\nThe same function {change}:\n\n```python\n{begun}\n")


def passages(tokenizer: Tokenizer) -> Iterator[list[int]]:
    parts = [part for part in PASSAGE.split("\n\n") if len(part) > 200]
    for number in count():
        part, asked = parts[number % len(parts)], ASKED[number // len(parts) % len(ASKED)]
        yield chat(tokenizer, f"{asked} this text:\n\n{part}")


def questions(tokenizer: Tokenizer) -> Iterator[list[int]]:
    for number in count():
        question, words = QUESTIONS[number % len(QUESTIONS)], 20 + 10 * (number // len(QUESTIONS))
        yield chat(tokenizer, f"{question} Answer in about {words} words.")


def stories(tokenizer: Tokenizer) -> Iterator[list[int]]:
    for number in count():
        about, tell = STORIES[number % len(STORIES)], number // len(STORIES)
        yield chat(tokenizer, f"Tell a story about {about}" + (f" in {tell + 2} parts." if tell else "."))


def chat(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_chat([{"role": "user", "content": text}])


KINDS = {"code": code, "passages": passages, "questions": questions, "stories": stories}


def answers(llm: LLM, requests: list[Request]) -> tuple[dict[str, list[int]], float]:
    """The tokens of requests that are handed in at once, and the seconds until the last one."""
    found: dict[str, list[int]] = {request.id: [] for request in requests}
    left, started = len(requests), time.perf_counter()
    with llm.client.mailbox() as mailbox:
        mailbox.submit(requests)
        while left:
            for output in mailbox.outputs():
                found[output.id] += output.token_ids
                left -= output.finish_reason is not None
    return found, time.perf_counter() - started


def measure(plain: Timed, drafting: Timed, args: argparse.Namespace) -> None:
    sampling = SamplingParams(max_tokens=args.tokens, ignore_eos=True, temperature=args.temperature)
    prompt = SamplingParams(max_tokens=1)  # computed before, so that decoding alone is timed
    print(
        "| text | at once | without | with | ratio | without, CPU | with, CPU | ratio | accepted |\n" + 9 * "|---" + "|"
    )
    for kind in args.kinds.split(","):
        prompts = KINDS[kind](plain.llm.tokenizer)
        for together in (int(number) for number in args.counts.split(",")):
            for run in range(-args.warm, args.runs):
                if run == 0:
                    before = drafting.llm.stats()
                    plain.begin()
                    drafting.begin()
                some = list(islice(prompts, together))
                requests = [Request(f"{kind}{together} {run} {at}", ids, sampling) for at, ids in enumerate(some)]
                first = [Request(f"{one.id} prompt", one.token_ids, prompt) for one in requests]
                for engine in (plain, drafting) if run % 2 else (drafting, plain):
                    answers(engine.llm, first)
                    engine.answer(requests)
            after = drafting.llm.stats()
            drafted = after.draft_tokens - before.draft_tokens
            accepted = after.accepted_tokens - before.accepted_tokens
            wall, cpu = (compared(plain.rates[of], drafting.rates[of]) for of in ("wall", "cpu"))
            print(f"| {kind} | {together} | {wall} | {cpu} | {accepted} of {drafted} |", flush=True)


class Timed:
    """An engine, and its tokens a second, by the clock and by the time that its processes had a processor."""

    def __init__(self, llm: LLM, others: set[int]) -> None:
        self.llm = llm
        self.processes = descendants() - others
        self.begin()

    def begin(self) -> None:
        self.rates: dict[str, list[float]] = {"wall": [], "cpu": []}

    def answer(self, requests: list[Request]) -> None:
        began = cpu_seconds(self.processes)
        found, seconds = answers(self.llm, requests)
        tokens = sum(map(len, found.values()))
        self.rates["wall"].append(tokens / seconds)
        self.rates["cpu"].append(tokens / max(cpu_seconds(self.processes) - began, 0.01))


def compared(without: list[float], with_: list[float]) -> str:
    """Both medians, and that of the pairs' ratios with the least and the greatest."""
    ratios = sorted(b / a for a, b in zip(without, with_, strict=True))
    middle = statistics.median(ratios)
    both = f"{statistics.median(without):.1f} | {statistics.median(with_):.1f}"
    return f"{both} | {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def descendants() -> set[int]:
    """Processes that this one has started, directly or not."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    new = {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new}
        found |= new
    return found


def cpu_seconds(processes: set[int]) -> float:
    """What they have used, user and system."""
    ticks = 0
    for pid in processes:
        with contextlib.suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def check(plain: LLM, drafting: LLM, args: argparse.Namespace) -> int:
    """How many of the prompts were answered differently."""
    sources = cycle([kind(plain.tokenizer) for kind in KINDS.values()])
    prompts = [next(source) for source in islice(sources, args.first + args.check)]
    requests = [
        Request(str(at), ids, SamplingParams(max_tokens=args.tokens, temperature=args.temperature, seed=at))
        for at, ids in enumerate(prompts)
    ][args.first :]
    differ = tokens = 0
    for start in range(0, args.check, 10):
        some = requests[start : start + 10]
        without, _ = answers(plain, some)
        with_, _ = answers(drafting, some)
        for id, expected in without.items():
            tokens += len(expected)
            if with_[id] != expected:
                differ += 1
                at = next(place for place, (a, b) in enumerate(zip(with_[id], expected, strict=False)) if a != b)
                print(f"prompt {id} differs from token {at} on", flush=True)
        print(f"{start + len(some)} prompts, {tokens} tokens, {differ} answers differ", file=sys.stderr, flush=True)
    stats = drafting.stats()
    print(
        f"{args.check} prompts, {tokens} tokens: {differ} answers differ; "
        f"{stats.accepted_tokens} of {stats.draft_tokens} drafts accepted"
    )
    return differ


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--tp", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device")
    parser.add_argument("--speculate", default="ngram")
    parser.add_argument("--counts", default="1,2,4,8")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--warm", type=int, default=1, help="sets of each kind that are not counted: graphs, kernels")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--check", type=int, default=0, metavar="PROMPTS")
    parser.add_argument("--first", type=int, default=0, help="of the prompts that are checked")
    args = parser.parse_args()
    settings: dict[str, Any] = {"dtype": args.dtype, "device": args.device, "max_model_len": 2048}
    settings |= {"kv_cache_memory": 1 << 29, "cpu_batched_tokens": 256, "gpu_memory_utilization": 0.4}
    with LLM(args.model, args.tp, **settings) as one:
        plain = Timed(one, set())
        with LLM(args.model, args.tp, speculate=args.speculate, **settings) as other:
            if args.check:
                return check(one, other, args)
            print({key: value for key, value in machine().items() if value}, other.info.dtype, other.info.speculation)
            measure(plain, Timed(other, plain.processes), args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
