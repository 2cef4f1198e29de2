"""A fresh fuzz, as a table: ``python -m tests.fuzz --cases 2000 [--seed N] [--targets config,index] [--small]``."""

from __future__ import annotations

import argparse
import secrets
import sys
import time

from tests.fuzz.hunt import Found, Tally, hunt
from tests.fuzz.runner import SECONDS, Runner
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Runs cases that nobody ran before.")
    parser.add_argument("--cases", type=int, default=2000, help="of all targets together")
    parser.add_argument("--seed", type=int, help="draw the cases of an earlier run again")
    parser.add_argument("--targets", default=",".join(TARGETS), help="some of them, with commas between")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="what a command may take")
    parser.add_argument("--small", action="store_true", help="make a small case for every fault (takes its time)")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else secrets.randbits(32)
    print(f"seed {seed}", flush=True)
    targets = options.targets.split(",")
    shares = [options.cases // len(targets) + (place < options.cases % len(targets)) for place in range(len(targets))]
    tallies = {target: Tally() for target in targets}
    begun = time.monotonic()
    with Runner(options.seconds) as runner:
        for target, cases in zip(targets, shares, strict=True):
            started = time.monotonic()
            hunt(runner, target, cases, seed=seed, raising=False, note=tallies[target].add)
            print(f"{target}: {cases} cases in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        _print(tallies, time.monotonic() - begun)
        for target, tally in tallies.items():
            for signature, (count, fault, case) in sorted(tally.faults.items()):
                print(f"\n{target}: {signature}, {count} times\n    {fault.said[:600]!r}", flush=True)
                print(
                    f"    {_small(runner, target, tally.cases, seed, signature) if options.small else case}", flush=True
                )
    return int(any(tally.faults for tally in tallies.values()))


def _small(runner: Runner, target: str, cases: int, seed: int, signature: str) -> str:
    try:
        hunt(runner, target, cases, seed=seed, only=signature)
    except Found as found:
        return str(found).replace("\n", "\n    ")
    return "not seen again"


def _print(tallies: dict[str, Tally], seconds: float) -> None:
    titles = "".join(f"{title:>8}" for title in ("exit 0", "exit 1", "exit 2"))
    print(f"\n{'target':<12}{'cases':>7}{titles}{'worst s':>9}{'worst MB':>10}{'faults':>8}")
    rows = [*tallies.items(), ("all", _sum(list(tallies.values())))]
    for name, tally in rows:
        codes = "".join(f"{tally.codes.get(code, 0):>8}" for code in (0, 1, 2))
        print(f"{name:<12}{tally.cases:>7}{codes}{tally.seconds:>9.1f}{tally.peak / 1e6:>10.0f}{len(tally.faults):>8}")
    print(f"{sum(tally.cases for tally in tallies.values()) / seconds:.0f} cases a second", flush=True)


def _sum(tallies: list[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.cases += tally.cases
        total.seconds, total.peak = max(total.seconds, tally.seconds), max(total.peak, tally.peak)
        total.faults.update(tally.faults)
        for code, count in tally.codes.items():
            total.codes[code] = total.codes.get(code, 0) + count
    return total


if __name__ == "__main__":
    sys.exit(main())
