"""A layer that predicts the token behind the next one (multi-token prediction, MTP; DeepSeek-AI, "DeepSeek-V3", 2024,
section 2.2), as data:

    next token ─ the model's embedding ─ norm ─┐
                                               ├─ [embedding; state] ─ projection ─ a block ─ norm ─ the model's head
    the model's last state, normed ──── norm ──┘

The block is one of the model's own kind, with full attention. The state of position p meets the token at p + 1, and
what comes out is about the token at p + 2; p is the position by which heads are rotated. Given what came out in place
of the state, and the token that was predicted, it predicts one more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tpctl.arch.block import Block, LayerPart
from tpctl.arch.linear import Linear, Norm
from tpctl.partition.split import TensorSplit

PREFIX, BLOCK = "mtp.", "mtp.layers.0."
"""Of names in a shard, of its own parts and of its block's, whatever a checkpoint calls them."""


@dataclass(frozen=True)
class Predictor:
    """Such a layer.

    Attributes:
        projection: [H, 2 H], of the embedding and, behind it, the state.
        source, block_source: what stands before the names of its own parts, and of its block's, in a checkpoint.
    """

    embedding_norm: Norm
    hidden_norm: Norm
    projection: Linear
    block: Block
    norm: Norm
    source: str
    block_source: str

    def placed(self) -> Iterator[tuple[str, str, LayerPart]]:
        """Its parts, in the order of a forward pass; each behind what stands before its names in a shard, and in a
        checkpoint."""
        for part in (self.embedding_norm, self.hidden_norm, self.projection):
            yield PREFIX, self.source, part
        for one in self.block.parts:
            yield BLOCK, self.block_source, one
        yield PREFIX, self.source, self.norm

    def splits(self) -> Iterator[TensorSplit]:
        """The split of every stored tensor, in that order."""
        for stored, source, part in self.placed():
            for split in part.splits():
                parts = tuple(replace(piece, source=source + piece.source) for piece in split.parts)
                yield replace(split, name=stored + split.name, parts=parts)

    def changed(self, projection: LayerPart, block: Callable[[Block], object]) -> Predictor:
        """With another projection and block."""
        new = block(self.block)
        assert isinstance(projection, Linear) and isinstance(new, Block)
        return replace(self, projection=projection, block=new)
