"""How a linear is cut for `wide_gemm`, and where the threads of its kernel have what.

A tile is 64 outputs for each of a program's groups of four warps, and so many rows of x; a group is 128 inputs. The
tiles are cut into parts of equal inputs, which a launch behind sums; or all groups of all tiles are shared out evenly,
in order, among the programs, so that a tile may begin in one and end in others, which leave what they have to the one
that began it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tpctl.kernels.linear.codes_tiles import Form


class WideCut(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
        form: of the codes. rows: of a tile, 64, 128 or 256. warpgroups: 1 or 2. stages: groups that the ring holds.
        split: parts of the inputs; 0: shared out evenly.
        activation: of gated outputs; else empty. has_bias, has_residual: there are such.
        pdl: launched before the kernel before has ended.
    """

    form: Form
    rows: int
    warpgroups: int
    stages: int
    split: int
    activation: str
    has_bias: bool
    has_residual: bool
    pdl: bool

    @property
    def gated(self) -> bool:
        return self.activation != ""

    @property
    def groups(self) -> int:
        return self.form.columns // 128

    @property
    def each(self) -> int:
        """Groups of a part."""
        return -(-self.groups // self.split)

    @property
    def scaled(self) -> bool:
        """Numbers are, not their sums."""
        return self.form.mode != "end"

    @property
    def sums(self) -> Any:
        """Where the tensor cores have [64, rows] sums."""
        from triton.experimental.gluon.language import NVMMADistributedLayout

        return NVMMADistributedLayout([3, 0], [4, 1], [16, self.rows, 16])

    @property
    def operand(self) -> Any:
        """Where they take [64, inputs] numbers from."""
        from triton.experimental.gluon.language import DotOperandLayout

        return DotOperandLayout(0, self.sums, 2)

    @property
    def words(self) -> Any:
        """[32, 64] bytes of codes: a thread has 16 of one row."""
        lanes = [[0, 16], [0, 32], *_OUTPUTS]
        return _linear([[0, 1], [0, 2], [0, 4], [0, 8]], lanes, _WARPS, [32, 64])

    @property
    def fragment(self) -> Any:
        """Half of the sums, [32, rows], as the tensor cores leave them."""
        return _linear([[0, 1], *self._rows(3)], [[0, 2], [0, 4], *_OUTPUTS], _WARPS, [32, self.rows])

    @property
    def stored(self) -> Any:
        """The same, eight outputs of a row in a thread, which are stored at once."""
        return _linear([*_OUTPUTS, *self._rows(5)], self._rows(0)[:5], _WARPS, [32, self.rows])

    @property
    def kept(self) -> Any:
        """All sums in a row, [64 * rows], four of a thread beside each other."""
        registers = [[1], [2], *([1 << bit] for bit in range(9, 6 + self.rows.bit_length() - 1))]
        return _linear(registers, [[4], [8], [16], [32], [64]], [[128], [256]], [64 * self.rows])

    def _rows(self, first: int) -> list[list[int]]:
        return [[0, 1 << bit] for bit in range(first, self.rows.bit_length() - 1)]


_OUTPUTS, _WARPS = [[1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]]


def _linear(registers: list[list[int]], lanes: list[list[int]], warps: list[list[int]], shape: list[int]) -> Any:
    """Which place in a tensor each bit of a register's, a lane's and a warp's number stands for."""
    from triton.experimental.gluon.language import DistributedLinearLayout

    return DistributedLinearLayout(registers, lanes, warps, [], shape)
