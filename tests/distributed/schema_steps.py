"""What a decode step takes with masks and without, in an engine of this process.

    python -m tests.distributed.schema_steps --rows 1 16 --threads 1

"no mask": requests without a form. "all allowed": each row has a mask, of a form that every text has, so that to find
it takes next to nothing, and what is left is to hand it over, to apply it and to wait for it. "a schema": a list of
objects that has no end here. Rounds of some steps take turns; told are the median and the least of all steps. Of those
with masks also what they do besides: "begin" hands rows to the threads that find masks, "finish" waits for those and
hands the masks to the device, "apply" takes the other tokens out of the logits.

On a GPU (``--device cuda``) steps without masks overlap, and those with masks do not: that is in the steps, not in
their parts, as "apply" only starts what the GPU does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from typing import Any, NamedTuple

import torch

from tests.schemas_parts import SHORT, SMALL, closed, listed
from tpctl.client.prepare import EngineArgs, prepare
from tpctl.client.tokenizer import Tokenizer
from tpctl.distributed import TPGroup
from tpctl.engine.engine import Engine
from tpctl.engine.guiding.grammars import Grammars
from tpctl.engine.guiding.guides import Guides
from tpctl.wire.guide import of_schema
from tpctl.wire.messages import Add, Request
from tpctl.wire.sampling import SamplingParams

PEOPLE = listed(closed({"name": SHORT, "age": SMALL}), 1000, 1000)
FORMS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "all allowed": {"regex": "(?s:.*)"},
    "a schema": {"response_format": of_schema(PEOPLE)},
}


class Step(NamedTuple):
    """Milliseconds of one, and of its parts."""

    whole: float
    begin: float
    finish: float
    apply: float


class Measured:
    """An engine whose steps are timed."""

    def __init__(self, model: str, device: str | None) -> None:
        config = prepare(model, EngineArgs(tp=1, device=device, max_model_len=1024))
        self._guides = Guides(Grammars(config.text_dir))
        self._engine = Engine(config, TPGroup(0, 1, config.device), self._guides)
        prompt = f"An example of JSON that follows this schema: {json.dumps(PEOPLE)}\n\n"
        self._prompt = Tokenizer(config.text_dir).encode(prompt)
        self._made = 0
        self._parts = {"begin": 0.0, "finish": 0.0, "apply": 0.0}
        masks, sampler = self._engine.runner.masks, self._engine.runner.sampler
        self._time(masks, "begin", "begin")
        self._time(masks, "finish", "finish")
        self._time(sampler, "_mask", "apply")

    def _time(self, of: Any, method: str, part: str) -> None:
        """Count what a method takes as a part of steps."""
        work = getattr(of, method)

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = work(*arguments)
            self._parts[part] += 1e3 * (time.perf_counter() - started)
            return result

        setattr(of, method, timed)

    def steps(self, form: dict[str, Any], rows: int, count: int) -> list[Step]:
        """So many decode steps of so many rows, of which the first ones, with the prompts, are left out."""
        requests = []
        for seed in range(rows):
            sampling = SamplingParams(temperature=1.0, seed=seed, max_tokens=count, min_tokens=count, **form)
            requests.append(Request(f"{self._made}", self._prompt, sampling))
            self._made += 1
            if sampling.guide is not None:
                self._guides.open(requests[-1], self._guides.grammars.matcher(sampling.guide))
        told, found = list(self._engine.apply(Add(requests))), []
        while self._engine.has_work:
            self._parts.update(dict.fromkeys(self._parts, 0.0))
            started = time.perf_counter()
            outputs = self._engine.step()
            whole = 1e3 * (time.perf_counter() - started)
            told += outputs
            if len(told) > 2 * rows and len(outputs) == rows:
                found.append(Step(whole, **self._parts))
        assert all(len(output.token_ids) == 1 for output in told) and len(told) == rows * count
        return found[1:-1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=12, help="of each answer in a round")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, help="of torch")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with torch.inference_mode():
        measured = Measured(args.model, args.device)
        for rows in args.rows:
            found = defaultdict(list)
            turns = list(FORMS)
            for _ in range(args.rounds):
                for name in turns:
                    found[name] += measured.steps(FORMS[name], rows, args.tokens)
                turns = [*turns[1:], turns[0]]
            print(f"steps of {rows} rows, {len(found[turns[0]])} of each; ms, median and least")
            for name in FORMS:
                parts = zip(Step._fields, zip(*found[name], strict=True), strict=True)
                told = (f"{part} {statistics.median(values):.3f} {min(values):.3f}" for part, values in parts)
                print(f"    {name}: {', '.join(told)}")


if __name__ == "__main__":
    main()
