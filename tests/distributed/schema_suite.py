"""Every kind of schema, asked of a model: whether what ends with "stop" is valid, and what a mask costs.

    python -m tests.distributed.schema_suite --tp 2 --temperature 1.0

Answers that end with "length" are no whole JSON, and say nothing. Masks are timed on the answers afterwards, alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from pathlib import Path

from tests.distributed.schema_store import sample, stored
from tests.schemas import all_schemas
from tests.schemas_kinds import problem_of
from tests.schemas_parts import Schema
from tpctl import LLM, SamplingParams
from tpctl.client.llm import Completion
from tpctl.client.prepare import EngineArgs, prepare
from tpctl.engine.guiding.grammars import Grammars
from tpctl.wire.guide import of_schema


def ask(llm: LLM, schemas: list[tuple[str, Schema]], temperature: float, most: int) -> list[Completion]:
    """An answer to each."""
    sampling = [
        SamplingParams(
            temperature=temperature, top_p=0.95, max_tokens=most, seed=number, response_format=of_schema(schema)
        )
        for number, (_, schema) in enumerate(schemas)
    ]
    told = (json.dumps(schema)[:2000] for _, schema in schemas)
    prompts = [f"An example of JSON that follows this schema: {text}\n\n" for text in told]
    return llm.generate(prompts, sampling)


def wrong(schemas: list[tuple[str, Schema]], answers: list[Completion]) -> list[str]:
    """What is said of answers that ended with "stop" and are not valid."""
    return [
        f"{name}: {answer.text!r}: {problem}"
        for (name, schema), answer in zip(schemas, answers, strict=True)
        if answer.finish_reason == "stop" and (problem := problem_of(schema, answer.text)) is not None
    ]


def mask_costs(llm: LLM, folder: Path, schemas: list[tuple[str, Schema]], answers: list[Completion]) -> list[float]:
    """Microseconds of CPU time of each mask, with what it takes to follow the token before."""
    grammars = Grammars(folder)
    ends = {answer.token_ids[-1] for answer in answers if answer.finish_reason == "stop"}
    grammars.suit(llm.tokenizer.backend.get_vocab_size(), sorted(ends))
    found = []
    for (_, schema), answer in zip(schemas, answers, strict=True):
        guide = SamplingParams(response_format=of_schema(schema)).guide
        assert guide is not None
        matcher = grammars.matcher(guide)
        for token in answer.token_ids[:-1]:
            started = time.thread_time()  # of this thread: a busy machine makes no mask dearer
            matcher.compute_bitmask()
            matcher.consume_token(token)
            found.append((time.thread_time() - started) * 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--every", type=int, default=1, help="of so many schemas take one")
    parser.add_argument("--store", type=Path, help="JSON Schema Store's (schema_store.py), not our own")
    parser.add_argument("--sample", type=int, default=120, help="of those so many")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    schemas = all_schemas() if args.store is None else sample(stored(args.store), args.sample, args.seed)
    schemas = schemas[:: args.every]
    folder = prepare(args.model, EngineArgs(tp=args.tp)).text_dir
    with LLM(args.model, tp=args.tp) as llm:
        started = time.monotonic()
        answers = ask(llm, schemas, args.temperature, args.max_tokens)
        seconds = time.monotonic() - started
        tokens = sum(len(answer.token_ids) for answer in answers)
        reasons = Counter(answer.finish_reason for answer in answers)
        print(f"{len(schemas)} schemas, {tokens} tokens in {seconds:.1f} s: {dict(reasons)}")
        bad = wrong(schemas, answers)
        print(f"{len(bad)} answers that ended with stop are not valid", *bad, sep="\n")
        if not reasons["stop"]:
            raise SystemExit("no answer ended with stop: nothing was shown")
        found = sorted(mask_costs(llm, folder, schemas, answers))
        at = [found[min(len(found) - 1, int(len(found) * share))] for share in (0.9, 0.99)]
        print(
            f"a mask: median {statistics.median(found):.0f} µs, 90% {at[0]:.0f}, 99% {at[1]:.0f}, most {found[-1]:.0f}"
        )
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
