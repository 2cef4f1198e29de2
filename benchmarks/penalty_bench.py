"""What penalties cost a step of the general sampler on a CPU: processor time of penalties alone, and of all of it."""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from tpctl.distributed import TPGroup
from tpctl.engine.sampling.penalties import penalize
from tpctl.engine.sampling.sampler import Sampler, SamplingRow
from tpctl.engine.scheduling.sequence import Sequence
from tpctl.partition.cuts import Range
from tpctl.wire.sampling import SamplingParams

WAY = SamplingParams(repetition_penalty=1.05, presence_penalty=0.5, frequency_penalty=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1000, help="of each row, half of them the prompt's")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(0)
    sequences = []
    for row in range(args.rows):
        sequence = Sequence(str(row), chance.choices(range(args.vocab), k=args.tokens // 2), WAY, args.tokens * 2)
        sequence.token_ids += chance.choices(range(args.vocab), k=args.tokens - args.tokens // 2)
        sequences.append(sequence)
    sampler = Sampler(TPGroup(), [Range(0, args.vocab)], args.vocab)
    logits = torch.randn(args.rows, args.vocab)
    alone, whole = [], []
    for step in range(args.steps + 2):  # the first counts what there is, the second finds memory
        changed = logits.clone()
        begun = time.process_time()
        counted = {row: sequence.counts().with_drafts(()) for row, sequence in enumerate(sequences)}
        penalize(changed, [WAY] * args.rows, counted, 0, args.vocab)
        ended = time.process_time()
        sampler.sample(logits, [SamplingRow(WAY, len(one.token_ids), one.counts()) for one in sequences])
        if step > 1:
            alone.append(ended - begun)
            whole.append(time.process_time() - ended)
        for sequence in sequences:
            sequence.token_ids.append(chance.randrange(args.vocab))
    for what, times in (("penalties", alone), ("the whole sampler", whole)):
        low, middle, high = (1e3 * one for one in (min(times), statistics.median(times), max(times)))
        print(f"{what}: {middle:.1f} ms a step ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
