"""The ranks of ``test_shared_memory``: many collectives of random shapes and dtypes, checked on every rank.

    python -m tests.distributed.collectives SIZE ROUNDS LONGEST

The ranks are forked, so that all of them find torch imported.

Every rank draws the same random script, and can make every other rank's tensors itself.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import signal
import socket
import sys
import time
import traceback

import torch
from torch import Tensor
from torch.distributed import TCPStore

from tpctl.distributed import TPGroup

DTYPES = (torch.bfloat16, torch.float32, torch.float64, torch.int64)


PERIOD = 10_007
"""Numbers after which a tensor repeats itself; a prime, so that no two slots of the memory hold the same."""


def tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    count, generator = math.prod(shape), torch.Generator().manual_seed(seed)
    drawn = torch.randint(-100, 100, (min(count, PERIOD),), generator=generator).to(dtype).div(8).to(dtype)
    return drawn.repeat(-(-count // PERIOD))[:count].view(shape)


def check(group: TPGroup, rng: random.Random, seed: int, longest: int, digest: hashlib._Hash) -> None:
    """One random collective."""
    dtype = rng.choice(DTYPES)
    shape = rng.choice([(), (1, 576), (rng.randint(1, longest),), (rng.randint(1, 40), rng.randint(0, longest // 40))])
    kind = rng.choice(["sum", "sum", "max", "gather", "broadcast", "minimum"])
    if kind == "minimum":
        assert group.minimum(seed * 31 % 17 - group.rank) == seed * 31 % 17 - group.size + 1
    else:
        check_one(group, kind, dtype, shape, seed, digest, columns_first=rng.random() < 0.3)


def check_one(
    group: TPGroup,
    kind: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    seed: int,
    digest: hashlib._Hash,
    columns_first: bool = False,
) -> None:
    """Eighths of small integers add up exactly in every dtype but bfloat16, which is rounded once."""
    everyone = torch.stack([tensor(shape, dtype, seed * 16 + rank) for rank in range(group.size)])
    mine = everyone[group.rank].clone()
    if columns_first and len(shape) == 2:
        mine = mine.t().contiguous().t()
    if kind == "sum":
        expected = (everyone if dtype == torch.int64 else everyone.double()).sum(0).to(dtype)
        found = group.all_reduce(mine)
        assert found.data_ptr() == mine.data_ptr(), "not in place"
    elif kind == "max":
        expected, found = everyone.amax(0), group.all_reduce_max(mine)
    elif kind == "broadcast":
        expected, found = everyone[0], group.broadcast(mine)
    else:
        expected, found = everyone, group.all_gather(mine)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    digest.update(found.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def run_rank(rounds: int, longest: int) -> None:
    torch.set_num_threads(1)
    group = TPGroup.from_environment("cpu")
    assert group._shared is not None, "these tests are about shared memory"
    rng, pauses, digest = random.Random(3), random.Random(group.rank), hashlib.sha256()
    for seed in range(rounds):
        if pauses.random() < 0.01:
            time.sleep(0.002)  # ranks arrive in every order
        check(group, rng, seed, longest, digest)
    x = torch.ones(576)  # in quick succession, where a slot that is written too early would show
    for number in range(rounds):
        assert group.all_reduce(x.fill_(number + group.rank)).eq(group.size * (2 * number + group.size - 1) / 2).all()
    for dtype in DTYPES:  # longer than a slot: two pieces, and three of float32
        count = 700_001 if dtype is torch.float32 else 1_400_002 // dtype.itemsize
        check_one(group, "sum", dtype, (count,), rounds, digest)
        check_one(group, "gather", dtype, (count // 1001, 1001), rounds, digest)
    seen = group.all_gather(torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8))
    assert seen.eq(seen[0]).all(), "the ranks saw different bits"
    group.close()
    print(f"rank {group.rank} is done", flush=True)


def main() -> int:
    """Start the ranks, and end them all when one fails; 1 then."""
    size, rounds, longest = map(int, sys.argv[1:])
    meet = socket.create_server(("127.0.0.1", 0), backlog=size)
    port = meet.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    ranks = set()
    for rank in range(size):
        if (pid := os.fork()) == 0:
            os.environ["RANK"] = str(rank)
            meet.close()
            code = 1
            try:
                run_rank(rounds, longest)
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        ranks.add(pid)
    # After all are forked: a fork beside the store's thread may copy a lock that it holds, which nobody frees.
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=meet.detach())
    failed = 0
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status and not failed:
            failed = 1
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    del store
    return failed


if __name__ == "__main__":
    sys.exit(main())
