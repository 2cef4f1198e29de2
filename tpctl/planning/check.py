"""Every tensor-parallel size of a model: whether it works, how evenly, at what copies, and what else would load it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tpctl.errors import PartitionError
from tpctl.planning.divided import axes, heads
from tpctl.planning.model_sizes import ModelSizes
from tpctl.planning.peers import Dealing, Objection, objections


@dataclass(frozen=True)
class SizeCheck:
    """A size, from 1 to the number of heads.

    Attributes:
        verdict: "even" (all ranks hold the same), "uneven", or "impossible", for the reason ``why``.
        imbalance: the largest rank's weight bytes over the mean; 1 is even.
        kv_copies: how many ranks hold each KV head, of the layer where most do.
        scale_copies: bytes of scales that are on two ranks because a border divides what they are of, all together.
        read_bytes: of the weights that the rank with most reads for one token, alone.
        vllm, sglang: what these engines have against it.
    """

    tp_size: int
    verdict: str
    why: str | None = None
    imbalance: float = 1.0
    kv_copies: float = 1.0
    scale_copies: int = 0
    read_bytes: int = 0
    vllm: tuple[Objection, ...] = ()
    sglang: tuple[Objection, ...] = ()


def check_sizes(model: ModelSizes, sizes: Iterable[int]) -> tuple[SizeCheck, ...]:
    """A check of each of ``sizes``."""
    small = model.small_blueprint
    whole = Dealing(
        tp_size=1,
        expert_size=1,
        vocab=small.vocab_size,
        heads=tuple(dict.fromkeys(heads(layer) for layer in small.layers)),
        axes=tuple(dict.fromkeys(axis for layer in small.layers for axis in axes(layer))),
    )
    kv_heads = model.heads(1)[0][1]
    return tuple(_check(model, whole, kv_heads, tp_size) for tp_size in sizes)


def _check(model: ModelSizes, whole: Dealing, kv_heads: int, tp_size: int) -> SizeCheck:
    try:
        held = model.heads(tp_size)
        ranks = model.dealt(tp_size).ranks(tp_size)
    except PartitionError as error:
        return SizeCheck(tp_size, "impossible", str(error))
    weights = [rank.weights for rank in ranks]
    dealt = replace(whole, tp_size=tp_size, expert_size=tp_size // model.expert_groups(tp_size))
    return SizeCheck(
        tp_size=tp_size,
        verdict="even" if len({(rank, *of) for rank, of in zip(weights, held, strict=True)}) == 1 else "uneven",
        imbalance=max(weights) * tp_size / sum(weights),
        kv_copies=sum(kv for _, kv in held) / kv_heads,
        scale_copies=sum(rank.scales for rank in ranks),
        read_bytes=max(rank.read for rank in ranks),
        vllm=objections("vllm", dealt),
        sglang=objections("sglang", dealt),
    )
