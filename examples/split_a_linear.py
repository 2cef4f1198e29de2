"""Column- and row-parallel linears by hand, on one CPU: the ranks' slices give back the whole layer.

    python examples/split_a_linear.py --tp 2

An MLP's up and down projections are cut for ``--tp`` ranks with the rules that tpctl shards by; each rank's part is
computed in turn. No communication is needed between the two, and one sum (between real ranks an all-reduce) ends it.
"""

from __future__ import annotations

import argparse

import torch

from tpctl.partition.cuts import split_aligned, split_heads


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int, default=2)
    tp_size: int = parser.parse_args().tp

    torch.manual_seed(0)
    tokens, hidden, width = 4, 576, 1536
    x = torch.randn(tokens, hidden)
    up, down = torch.randn(width, hidden), torch.randn(hidden, width)
    whole = torch.relu(x @ up.T) @ down.T

    total = torch.zeros_like(whole)
    for rank, share in enumerate(split_aligned(width, tp_size)):
        rows = up[share.start : share.stop]  # column-parallel: some output features
        columns = down[:, share.start : share.stop]  # row-parallel: the same ones as input features
        partial = torch.relu(x @ rows.T) @ columns.T
        print(f"rank {rank}: up rows {share.start}:{share.stop}, down columns the same, partial {list(partial.shape)}")
        total += partial
    print(
        f"largest difference to the whole layer: {(total - whole).abs().max() / whole.abs().max():.1e} of the largest"
    )

    for rank, heads in enumerate(split_heads(9, 3, tp_size)):
        print(f"rank {rank}: query heads {heads.query.start}:{heads.query.stop}, KV {heads.kv.start}:{heads.kv.stop}")


if __name__ == "__main__":
    main()
