"""What a model is made of, layer by layer: the one description that all else is derived from.

The sharder takes from it which tensors there are and how they are cut, the decoder which modules to build, the planner
how many bytes everything takes, the page what to draw. Layers need not be alike.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tpctl.arch.block import Block, Experts, Layer, LayerPart, Mixer, linears
from tpctl.arch.latent import Attending
from tpctl.arch.linear import Linear, Norm
from tpctl.arch.predictor import Predictor
from tpctl.errors import UnsupportedModelError
from tpctl.partition.cuts import Vocab
from tpctl.partition.split import Part, Rule, TensorSplit

ROOT = "model."
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Blueprint:
    """A decoder-only model.

    Attributes:
        layers: of it, in order; they need not be alike.
        norm: the last one.
        tied: the head is the embedding's tensor, stored once, as ``head``.
        embedding_scale: what looked up rows are multiplied by; ``rounds_scale``: rounded to their dtype first (Gemma).
        logit_scale: what logits are multiplied by, before their cap.
        logit_softcap: as of ``Attention``, for the logits.
        prefix: of a layer's names, with its number in place of ``{}``.
        unused: names, less the layer's prefix, that a checkpoint may hold in any layer and nobody reads.
        further: a layer that a checkpoint may have beside the model, which predicts one token more. ``predictor``: the
            same, where the checkpoint has it (``source_plan.as_held``).
        left_out: patterns of names of what else is beside the model (further such layers, and one of which something is
            missing); no rank has them, and ``merge`` gives them back.
        towers: patterns of names of what sees or hears; the same, for somebody who wants the text model alone.
        roots: what a checkpoint may have in place of ``model.`` before its names.
        beside: what stands beside the embedding, before the layers; names are whole.
        stored: the embedding's and the head's names in a shard, by their own, where another engine has other ones.
        lacks: what tpctl would have to know to run it; ``None``: it runs it.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    norm: Norm
    tied: bool
    embedding: str = EMBEDDING
    head: str = LM_HEAD
    embedding_scale: float = 1.0
    rounds_scale: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    prefix: str = "model.layers.{}."
    unused: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)
    further: Predictor | None = None
    predictor: Predictor | None = None
    left_out: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()
    roots: tuple[str, ...] = (ROOT,)
    beside: tuple[LayerPart, ...] = ()
    lacks: str | None = None
    stored: tuple[tuple[str, str], ...] = ()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The layers, of a model that tpctl runs. Raises as ``check_runs``."""
        self.check_runs()
        return tuple(layer for layer in self.layers if isinstance(layer, Block))

    def check_runs(self, device: str = "cpu") -> None:
        """Raise ``UnsupportedModelError`` if tpctl does not run the model, or not on such a device; the message says
        why."""
        if (why := self.why_not_run()) is not None:
            raise UnsupportedModelError(
                f"the model has {why}, which tpctl cuts but does not run yet; use shard, plan, inspect-shards and merge"
            )
        if (why := self.why_not_on(device)) is not None:
            raise UnsupportedModelError(f"the model has {why}, which tpctl does not run on GPUs yet; use --device cpu")

    def why_not_on(self, device: str) -> str | None:
        """What of a model that tpctl runs it does not run on ``device``."""
        return next((layer.mixer.kind for layer in self.layers if device not in layer.mixer.runs_on), None)

    def why_not_run(self) -> str | None:
        """What of the model tpctl does not run; ``None``: it runs it."""
        for layer in self.layers:
            for part in layer.parts:
                if isinstance(part, Experts) and part.routing is None:
                    return "a mixture of experts with a router of its own kind"
                if isinstance(part, Mixer) and not part.runs_on:
                    return part.kind
        return self.lacks

    def splits(self) -> Iterator[TensorSplit]:
        """The split of every stored tensor, in the order in which a forward pass meets them."""
        vocab = Part(self.embedding, self.vocab_size, Vocab())
        if not self.tied:
            yield TensorSplit(self.stored_name(self.embedding), Rule.VOCAB, (vocab,), others=(self.hidden_size,))
        for part in self.beside:
            yield from part.splits()
        for number, layer in enumerate(self.layers):
            for split in layer.splits:
                yield _prefixed(split, self.prefix.format(number))
        yield from self.norm.splits()
        head = vocab if self.tied else replace(vocab, source=self.head)
        yield TensorSplit(self.stored_name(self.head), Rule.VOCAB, (head,), others=(self.hidden_size,))
        if self.predictor is not None:
            yield from self.predictor.splits()

    def without_predictor(self) -> Blueprint:
        """The same, whatever checkpoints have beside the model."""
        return replace(self, further=None, predictor=None)

    def stored_name(self, name: str) -> str:
        """What ``name``, the embedding's or the head's, is called in a shard."""
        return dict(self.stored).get(name, name)

    @property
    def output(self) -> Linear:
        """The head, as a linear whose outputs are the vocabulary."""
        name = self.head.removesuffix(".weight")
        return Linear(name, Rule.VOCAB, (Part(name, self.vocab_size, Vocab()),), self.hidden_size)

    def root(self, names: Container[str]) -> str:
        """Which of ``roots`` a checkpoint with tensors ``names`` has."""
        telling = (self.embedding, f"{self.norm.name}.weight", self.head)  # the head may have one name under all roots
        found = (root for name in telling for root in self.roots if renamed(name, root) in names)
        return next(found, self.roots[0])

    def constants(self, names: Collection[str]) -> dict[str, tuple[int, int]]:
        """Those of a checkpoint's ``names`` that hold the shape of a packed weight, [out, in], with that shape."""
        return {
            held: shape
            for prefix, root, linear in self._linears(names)
            for name, shape in linear.constants()
            if (held := renamed(prefix + name, root)) in names
        }

    def ordered(self, names: Collection[str]) -> dict[str, int]:
        """Those that say which group each input of a weight is of, with how many are in one, in order."""
        return {
            held: group
            for prefix, root, linear in self._linears(names)
            for name, group in linear.ordered()
            if (held := renamed(prefix + name, root)) in names
        }

    def free_orders(self, names: Collection[str]) -> dict[str, int]:
        """Those that put the inputs of a weight into groups in any order, with how many groups there are."""
        return {
            held: count
            for prefix, root, linear in self._linears(names)
            for name, count in linear.free_orders()
            if (held := renamed(prefix + name, root)) in names
        }

    def placed(self) -> Iterator[tuple[str, str, LayerPart]]:
        """Every part of a layer or beside the layers, behind what stands before its names in a shard, and what does in
        a checkpoint whose root is ``model.``"""
        yield from (("", "", part) for part in self.beside)
        for number, layer in enumerate(self.layers):
            prefix = self.prefix.format(number)
            yield from ((prefix, prefix, part) for part in layer.parts)
        if self.predictor is not None:
            yield from self.predictor.placed()

    def _linears(self, names: Container[str]) -> Iterator[tuple[str, str, Linear]]:
        """Every linear, with what stands before its names in a checkpoint, and the root of ``names``."""
        root = self.root(names)
        yield from ((prefix, root, linear) for _, prefix, part in self.placed() for linear in linears(part))

    def unread(self, names: Collection[str]) -> set[str]:
        """Those of a checkpoint's ``names`` that no rank needs: RoPE's tables, a tied head's second copy, shapes of
        packed weights, what is left out, and towers."""
        root = self.root(names)
        known = {self.prefix.format(number) + name for number in range(len(self.layers)) for name in self.unused}
        if self.tied:
            known.add(self.head)
        known = {renamed(name, root) for name in known} | self.constants(names).keys()
        known |= {renamed(before + name, root) for before, _, one in self._linears(names) for name in one.unread()}
        patterns = (*self.left_out, *self.towers)
        apart = re.compile("|".join(patterns)) if patterns else None
        read = (
            set()
            if self.predictor is None
            else {renamed(source, root) for split in self.predictor.splits() for source in split.sources}
        )
        return {
            name
            for name in names
            if name in known or (apart is not None and name not in read and apart.fullmatch(name))
        }

    @cached_property
    def alike(self) -> Mapping[int, Sequence[int]]:
        """The layers that are cut alike, by the first of them."""
        first: dict[tuple[TensorSplit, ...], int] = {}
        found: dict[int, list[int]] = {}
        for number, layer in enumerate(self.layers):
            found.setdefault(first.setdefault(layer.splits, number), []).append(number)
        return found

    @property
    def max_tp(self) -> int:
        """The most ranks that attention can be dealt to; other cuts may allow fewer."""
        return min(layer.mixer.num_heads for layer in self.layers)

    @property
    def attentions(self) -> tuple[Attending, ...]:
        """Those of the layers that keep something of every token, in order, the predictor's behind them. Raises as
        ``check_runs``."""
        blocks = (*self.blocks, *(() if self.predictor is None else (self.predictor.block,)))
        attentions = (block.attention for block in blocks)
        return tuple(one for one in attentions if isinstance(one, Attending) and one.reads is None)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each of ``attentions``."""
        return tuple(attention.window for attention in self.attentions)


def renamed(name: str, root: str) -> str:
    """The name that tensor or module ``name`` has in a checkpoint with that ``root``. The head is beside ``model.``"""
    if name.startswith(ROOT):
        return root + name.removeprefix(ROOT)
    beside = root.removesuffix(ROOT) if f".{root}".endswith(f".{ROOT}") else ""  # model.language_model. has no other
    return beside + name


def _prefixed(split: TensorSplit, prefix: str) -> TensorSplit:
    parts = tuple(replace(part, source=prefix + part.source) for part in split.parts)
    return replace(split, name=prefix + split.name, parts=parts)
