"""How the experts of one row are cut for `row_ring`, and what lies where in a program's shared memory.

A chunk is 16 bytes of a row of W, which one thread copies, reads and multiplies. A team of warps shares a row; the
chunks of `down`'s rows are those of all chosen experts, one behind the other.

A chunk's inputs are more bytes than that. They lie in pieces of 16 bytes, first the first ones of all chunks, then the
second ones: so neighbouring threads read what lies together.

    inputs of chunks a, b, c, two pieces each:  a0 b0 c0 a1 b1 c1
"""

from __future__ import annotations

from typing import NamedTuple


class ExpertCut(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        kind: "bf16", "e4m3" (scales for blocks of 128 x 128) or "e2m1" (exponents for 32 inputs).
        per_token: K. inputs, outputs: of an expert's matrix. gated: it is gate_up, else down.
        interleaved: gates and ups alternate. all_here: no expert is another rank's.
        share: warps of a team. teams: of a program. step: rows that a warp sums at once, 2 or 4; of gate_up half of
            them are gates. ahead: rows that the ring holds for a team, some steps'.
        scale_bytes: of a scale; 0: there are none.
        least: bytes of shared memory that a program is to take.
    """

    kind: str
    per_token: int
    inputs: int
    outputs: int
    gated: bool
    interleaved: bool
    all_here: bool
    share: int
    teams: int
    step: int
    ahead: int
    programs: int
    scale_bytes: int = 0
    least: int = 0

    @property
    def warps(self) -> int:
        return self.share * self.teams

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def team(self) -> int:
        """Threads of a team."""
        return 32 * self.share

    @property
    def size(self) -> int:
        """Inputs of a chunk."""
        return {"bf16": 8, "e4m3": 16, "e2m1": 32}[self.kind]

    @property
    def piece(self) -> int:
        """Inputs in 16 bytes of h, which is float32 for numbers, and bfloat16 for codes."""
        return 4 if self.kind == "bf16" else 8

    @property
    def row_chunks(self) -> int:
        """Of a row of W."""
        return self.inputs // self.size

    @property
    def all_chunks(self) -> int:
        """Of what a team sums."""
        return self.row_chunks * (1 if self.gated else self.per_token)

    @property
    def chunks(self) -> int:
        """Of a thread."""
        return -(-self.all_chunks // self.team)

    @property
    def full(self) -> int:
        """How many of a thread's chunks are there in every thread, and of an expert that is here."""
        if not (self.gated or self.all_here):
            return 0
        return self.all_chunks // self.team

    @property
    def width(self) -> int:
        """Results of an expert."""
        return self.outputs // 2 if self.gated else self.outputs

    @property
    def units(self) -> int:
        """Results of all programs."""
        return self.width * (self.per_token if self.gated else 1)

    @property
    def unit_rows(self) -> int:
        return 2 if self.gated else 1

    @property
    def step_units(self) -> int:
        return self.step // self.unit_rows

    @property
    def most(self) -> int:
        """The most units that a program has."""
        return -(-self.units // self.programs)

    @property
    def blocks(self) -> int:
        """Steps of all teams, as many of each."""
        return -(-self.most // (self.step_units * self.teams)) * self.teams

    @property
    def turns(self) -> int:
        """Steps that the ring holds for a team."""
        return self.ahead // self.step

    @property
    def results(self) -> int:
        """Units of a thread, when a program ends."""
        return -(-self.most // self.threads)

    @property
    def scale_rows(self) -> int:
        """Of e4m3: of an expert."""
        return -(-self.outputs // 128)

    @property
    def scale_columns(self) -> int:
        return -(-self.inputs // 128)

    @property
    def expert_scales(self) -> int:
        """Bytes of an expert's scales."""
        each = self.scale_rows * self.scale_columns if self.kind == "e4m3" else self.outputs * self.row_chunks
        return each * self.scale_bytes

    # Where in shared memory, in bytes: the ring, and then

    @property
    def row_bytes(self) -> int:
        """Of a row in the ring."""
        return self.chunks * self.team * 16

    @property
    def scales(self) -> int:
        """A word for each chunk in the ring."""
        return self.teams * self.ahead * self.row_bytes

    @property
    def partial(self) -> int:
        """Sums [rows, share] float32."""
        return self.scales + (0 if self.kind == "bf16" else self.scales // 4)

    @property
    def bytes(self) -> int:
        """All, in multiples of 256, of which the last are nobody's."""
        needed = self.partial + self.blocks * self.step * self.share * 4 + 256
        return -(-max(self.least, needed) // 256) * 256


class Choice(NamedTuple):
    """How a kernel chooses: `arch.routing`, without groups; experts of all ranks, and of a token."""

    scores: str
    renormalise: bool
    scale: float
    epsilon: float
    corrected: bool
    experts: int
    per_token: int

    @property
    def each(self) -> int:
        """Experts of a lane."""
        return -(-self.experts // 32)
