"""How a linear is cut for `codes_ring`, and what lies where in a program's shared memory.

A tile is a group (128 inputs) of 16 rows of W, a unit: 64 bytes of a row, or, of 8-bit kinds, two halves of 64. A warp
takes the same groups of all units of its program, a run of them at once.
"""

from __future__ import annotations

from typing import NamedTuple


class RingCut(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
        kind: "uint4" or "e4m3". columns: inputs. zero: the code that stands for zero, where it is one for all.
        has_zeros: there is one for each scale. fp16: scales are float16, not bfloat16.
        gated: of a unit's rows eight are gates, and the others their up halves.
        rows: of x: 1, 2, 4 or 8. run: groups, at most 8 / rows. ahead: runs that the ring holds for a warp.
        units: the most that one of so many programs has. least: bytes of shared memory that a program is to take.
    """

    kind: str
    columns: int
    zero: int
    has_zeros: bool
    fp16: bool
    gated: bool
    rows: int
    warps: int
    run: int
    ahead: int
    programs: int
    units: int
    least: int = 0

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def groups(self) -> int:
        return self.columns // 128

    @property
    def share(self) -> int:
        """Groups of a warp."""
        return self.groups // self.warps

    @property
    def runs(self) -> int:
        """Those of a unit that a warp has."""
        return self.share // self.run

    @property
    def tiles(self) -> int:
        """Those in the ring of a warp."""
        return self.run * self.ahead

    @property
    def halves(self) -> int:
        return 2 if self.kind == "e4m3" else 1

    @property
    def row_bytes(self) -> int:
        return self.halves * self.columns // 2

    @property
    def outputs(self) -> int:
        """Those of a unit."""
        return 8 if self.gated else 16

    @property
    def results(self) -> int:
        """Those of a thread, when a program ends."""
        return -(-self.units * self.outputs * self.rows // self.threads)

    @property
    def chunks(self) -> int:
        """How many times eight inputs a thread prepares."""
        return -(-self.rows * self.columns // 8 // self.threads)

    @property
    def last_chunk(self) -> int:
        return self.rows * self.columns // 8 - 1

    # Where in shared memory, in bytes: the ring, and then

    @property
    def x(self) -> int:
        """Inputs, 256 bytes a group."""
        return self.warps * self.tiles * self.halves * 1024

    @property
    def no_x(self) -> int:
        """Zeros, of which 256 bytes are read, in other banks than x."""
        return self.x + 2 * self.rows * self.columns

    @property
    def sums(self) -> int:
        """Of each group's inputs, float32."""
        return self.no_x + 512

    @property
    def squares(self) -> int:
        """Of all inputs, by warps."""
        return self.sums + 4 * self.rows * self.groups

    @property
    def scales(self) -> int:
        return self.squares + 64

    @property
    def pitch(self) -> int:
        """From one row's scales to the next: those of eight rows are in different banks."""
        return 2 * self.groups + 16

    @property
    def zeros(self) -> int:
        return self.scales + (self.units * 16 * self.pitch if self.kind == "uint4" else 0)

    @property
    def partial(self) -> int:
        """Sums [units, warps, rows, 16] float32."""
        return self.zeros + (self.units * 16 * self.groups if self.has_zeros else 0)

    @property
    def bytes(self) -> int:
        """All, in multiples of 256."""
        needed = self.partial + self.units * self.warps * self.rows * 64
        return -(-max(self.least, needed) // 256) * 256
