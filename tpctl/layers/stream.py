"""The residual stream: what a decoder's blocks read from and add to, with the sums over the ranks.

Between blocks every rank holds the same residual [T, H]. What a row-parallel linear adds is a partial sum, and three
things follow it on the same rows: the all-reduce, the addition, and the norm that the next linear reads. A stream takes
these together where its device can: ``add`` may leave a sum open until ``normed`` asks for the result.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from tpctl.distributed import TPGroup
from tpctl.layers.norm import RMSNorm


class Rows(NamedTuple):
    """[T, H] as a linear takes them; ``norm``: one that is left to the linear."""

    x: Tensor
    norm: RMSNorm | None = None


class Summand(Protocol):
    """What is added to a residual, of some ``x``: a row-parallel linear, or a mixture of experts."""

    def __call__(self, x: Any, /) -> Any:
        """[T, H], summed over the ranks."""
        ...

    def local(self, x: Any, /) -> Tensor:
        """This rank's partial sum [T, H]."""
        ...

    def partial(self, x: Any, /) -> Tensor:
        """As ``local``, or runs of it [S, T, H], and already sent where the device's linears send sums themselves."""
        ...

    def add_to(self, residual: Tensor, x: Any, /) -> None:
        """On one rank: add it to ``residual`` [T, H] in place."""
        ...


class Together(NamedTuple):
    """Two summands that are added at once, of a pair of inputs, with one sum over the ranks."""

    first: Summand
    second: Summand
    group: TPGroup

    def __call__(self, x: Any, /) -> Tensor:
        return self.group.all_reduce(self.local(x))

    def local(self, x: Any, /) -> Tensor:
        return self.first.local(x[0]) + self.second.local(x[1])

    def partial(self, x: Any, /) -> Tensor:
        raise NotImplementedError("a linear would send a part of the sum alone")

    def add_to(self, residual: Tensor, x: Any, /) -> None:
        self.first.add_to(residual, x[0])
        self.second.add_to(residual, x[1])


class ResidualStream:
    """In plain torch, on any device.

    Args:
        residual: [T, H], the same on every rank.
    """

    def __init__(self, residual: Tensor, group: TPGroup) -> None:
        self._residual = residual
        self._group = group

    def normed(self, norm: RMSNorm | None) -> Rows:
        """The residual, normed; ``None``: as it is."""
        return Rows(self._residual if norm is None else norm(self._residual))

    def add(self, summand: Summand, x: Any, norm: RMSNorm | None = None, scale: float = 1.0) -> None:
        """Add ``scale`` times what ``summand`` makes of ``x``, summed over the ranks; through ``norm``, if there is
        one."""
        total = summand(x)
        self._residual.add_(total if norm is None else norm(total), alpha=scale)

    def join(self, whole: Tensor, norm: RMSNorm | None = None) -> None:
        """Add [T, H] that every rank has whole; through ``norm``, if there is one."""
        self._residual.add_(whole if norm is None else norm(whole))

    def scale(self, factor: Tensor) -> None:
        """Multiply the residual by a number [1]."""
        self._residual.mul_(factor)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of T (int64 [R]) alone."""
        self._residual = self._residual[rows]
