"""The states of one recurrent layer: a pool of slots, in which the engine gives every sequence one. Shapes as in
``rule``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tpctl.arch.delta_net import NetSizes
from tpctl.layers.attention.sdpa_cache import lazy_zeros
from tpctl.layers.batch import SequenceState


@dataclass(frozen=True)
class LayerState:
    """``matrices`` [slots, N, D, E], float32; ``inputs`` [slots, P, X] of the convolution, in the model's dtype: in
    plain torch the last P - 1, the oldest first, in kernels that of the token at position p in row p % P."""

    matrices: Tensor
    inputs: Tensor

    @classmethod
    def allocate(cls, sizes: NetSizes, num_slots: int, dtype: torch.dtype, device: torch.device) -> LayerState:
        """Of one layer of this rank."""
        matrix = (num_slots, sizes.value_heads, sizes.key_dim, sizes.value_dim)
        return cls(
            lazy_zeros(matrix, torch.float32, device),
            lazy_zeros((num_slots, sizes.taps, sizes.channels), dtype, device),
        )

    def begin(self, states: Iterable[SequenceState]) -> None:
        """Bring what each sequence goes on from into its own slot, where it is not there yet."""
        for state in states:
            if state.source is None:
                self.matrices[state.slot].zero_()
                self.inputs[state.slot].zero_()
            elif state.source != state.slot:
                self.keep(state.source, state.slot)

    def keep(self, slot: int, copy: int) -> None:
        """Copy a state into slot ``copy``."""
        self.matrices[copy] = self.matrices[slot]
        self.inputs[copy] = self.inputs[slot]
