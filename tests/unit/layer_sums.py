"""What ranks compute with the matrices that they hold, layer by layer: their sums are the whole layer's results.

Of what a layer does only that is here by which its linears belong together: which outputs of one are which inputs of
another, in heads and experts. Norms, positions, convolutions and masks are left out; all of those are held against
transformers in ``test_families_mixtures_ranks`` and ``test_families_dense_cut_ranks``.

Shapes: T tokens, H hidden, Q/K query and KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.unit.attending import attend
from tests.unit.packing import Index, Matrix
from tpctl.arch.block import Attention, Experts, Gated, Mixer, linears
from tpctl.arch.blueprint import Blueprint
from tpctl.arch.linear import Linear
from tpctl.partition.cuts import QueryHeads
from tpctl.partition.split import EACH, Part

Array = NDArray[np.float64]
TOKENS = 3


@dataclass(frozen=True)
class Local:
    """What a rank has of a module: its outputs and inputs, and the matrix of them."""

    outputs: Index
    inputs: Index
    matrix: Matrix


class Weights:
    """What one rank, or all of them together, have of a layer's linears: float64, found by label or own name."""

    def __init__(self, held: Mapping[str, Local], prefix: str) -> None:
        self._held, self._prefix = held, prefix

    def of_layer(self, prefix: str) -> Weights:
        return Weights(self._held, prefix)

    def __call__(self, linear: Linear, part: Part, expert: int | None = None) -> Array | None:
        """The matrix of ``part``; ``None``: the rank has nothing of it."""
        source = self._prefix + part.source
        if expert is not None:
            source = source.replace(EACH, str(expert)) if EACH in source else f"{source}[{expert}]"
        several = sum(one.source == part.source for one in linear.parts) > 1
        found = self._held.get(f"{source}:{part.label}" if several else source)
        return None if found is None else found.matrix.astype(np.float64)

    def parts(self, linear: Linear, expert: int | None = None) -> dict[str, Array]:
        found = {part.label: self(linear, part, expert) for part in linear.parts}
        return {label: matrix for label, matrix in found.items() if matrix is not None}

    def one(self, linear: Linear, expert: int | None = None) -> Array:
        (matrix,) = self.parts(linear, expert).values()
        return matrix


Compute = Callable[[Array, Weights], Array | None]
"""A part of a layer: its result, or what a rank adds to it; ``None``: nothing, as it has no part of it."""


def check(
    blueprint: Blueprint,
    config: Mapping[str, Any],
    matrices: Mapping[str, Matrix],
    ranks: Sequence[Mapping[str, Local]],
) -> None:
    """Check that what ``ranks`` compute, added, is what is computed with the whole ``matrices``."""
    x_TH = np.random.default_rng(1).standard_normal((TOKENS, blueprint.hidden_size))
    every, computed = _whole(blueprint, matrices), 0
    for number in range(len(blueprint.layers)):
        prefix = blueprint.prefix.format(number)
        for name, compute in _layer(blueprint, number, config):
            expected = compute(x_TH, Weights(every, prefix))
            assert expected is not None and np.isfinite(expected).all() and np.abs(expected).max() > 0, (number, name)
            total = np.zeros_like(expected)
            for held in ranks:
                mine = compute(x_TH, Weights(held, prefix))
                total += 0 if mine is None else mine
            atol = 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(total, expected, rtol=1e-5, atol=atol, err_msg=f"{name} of layer {number}")
            computed += 1
    assert computed >= 2 * len(blueprint.layers)


def _whole(blueprint: Blueprint, matrices: Mapping[str, Matrix]) -> dict[str, Local]:
    """``matrices``, and of those that hold several parts each of them."""
    found = {name: Local(np.arange(len(one)), np.arange(one.shape[1]), one) for name, one in matrices.items()}
    for number, layer in enumerate(blueprint.layers):
        for linear in (linear for part in layer.parts for linear in linears(part)):
            experts = [""] if linear.stack is None else [f"[{one}]" for one in range(linear.stack.count)]
            if len({part.source for part in linear.parts}) == len(linear.parts):
                continue
            for part in linear.parts:
                rows = np.arange(part.offset, part.offset + part.length)
                for module in (f"{blueprint.prefix.format(number)}{part.source}{expert}" for expert in experts):
                    held = matrices[module][rows]
                    found[f"{module}:{part.label}"] = Local(rows, np.arange(held.shape[1]), held)
    return found


def _layer(blueprint: Blueprint, number: int, config: Mapping[str, Any]) -> Iterator[tuple[str, Compute]]:
    """What a layer computes, by name."""
    for part in blueprint.layers[number].parts:
        if isinstance(part, Mixer) and part.recurrent:
            yield "delta net", lambda x, get, part=part: _delta_net(x, get, part, config)
        elif isinstance(part, Mixer) and not part.num_kv_heads:
            yield "latent attention", lambda x, get, part=part: _latent(x, get, part)
        elif isinstance(part, Attention | Mixer):
            qkv, out = _projections(part)
            yield "attention", _attention(blueprint, number, qkv, out)
        elif isinstance(part, Gated):
            yield "mlp", lambda x, get, part=part: _gated(x, get, part.gate_up, part.down)
        elif isinstance(part, Experts):
            for expert in range(part.count):
                yield f"expert {expert}", lambda x, get, part=part, n=expert: _gated(x, get, part.gate_up, part.down, n)
            if part.shared is not None:
                yield "shared", lambda x, get, one=part.shared: _gated(x, get, one.gate_up, one.down)


def _gated(x_TH: Array, get: Weights, gate_up: Linear, down: Linear, expert: int | None = None) -> Array | None:
    found = get.parts(gate_up, expert)
    if not found:
        return None
    if "gate_up" in found:  # row by row in turn
        found = {"gate": found["gate_up"][::2], "up": found["gate_up"][1::2]}
    gate, up = x_TH @ found["gate"].T, x_TH @ found["up"].T
    return np.asarray((np.tanh(gate / 100) * up) @ get.one(down, expert).T)


def _projections(part: Attention | Mixer) -> tuple[Linear, Linear]:
    if isinstance(part, Attention):
        return part.qkv, part.out
    qkv, out = (one for one in part.parts if isinstance(one, Linear))
    return qkv, out


def _attention(blueprint: Blueprint, number: int, qkv: Linear, out: Linear) -> Compute:
    """Grouped-query attention: with an output gate where a query head has twice as many rows, of keys as values where
    there are none; of layers with queries alone, with the keys and values of the last one that has some of that size.
    """
    assert isinstance(out.input_cut, QueryHeads)
    head_dim = out.input_cut.head_dim
    prefix, keys = blueprint.prefix.format(number), qkv
    if len(qkv.parts) == 1:
        for before in range(number):
            other, after = _projections(blueprint.layers[before].mixer)
            if len(other.parts) > 1 and getattr(after.input_cut, "head_dim", None) == head_dim:
                prefix, keys = blueprint.prefix.format(before), other

    def compute(x_TH: Array, get: Weights) -> Array:
        def heads(name: str, found: Mapping[str, Array]) -> Array:
            return 0.1 * (x_TH @ found[name].T).reshape(len(x_TH), -1, head_dim)

        q_TQD, kept = heads("q", get.parts(qkv)), get.of_layer(prefix).parts(keys)
        gate = None
        if isinstance(qkv.parts[0].cut, QueryHeads) and qkv.parts[0].cut.head_dim == 2 * head_dim:
            q_TQD, gate = q_TQD[:, ::2], q_TQD[:, 1::2].reshape(len(x_TH), -1)
        k_TKD = heads("k", kept)
        found = attend(q_TQD, k_TKD, heads("v", kept) if "v" in kept else k_TKD)
        return np.asarray((found if gate is None else found * np.tanh(gate)) @ get.one(out).T)

    return compute


def _latent(x_TH: Array, get: Weights, part: Mixer) -> Array:
    """MLA: heads made of one latent vector a token; a key is a part of its own and one that all heads share."""
    *queries, a, b, out = (one for one in part.parts if isinstance(one, Linear))
    last, kv, value = queries[-1].parts[0].cut, b.parts[0].cut, out.input_cut
    assert isinstance(last, QueryHeads) and isinstance(kv, QueryHeads) and isinstance(value, QueryHeads)
    q_TN = x_TH
    for one in queries:
        q_TN = 0.1 * q_TN @ get.one(one).T
    latent = 0.1 * x_TH @ get.one(a).T
    shared_TD = latent[:, b.inputs :]
    kv_TQN = 0.1 * (latent[:, : b.inputs] @ get.one(b).T).reshape(len(x_TH), -1, kv.head_dim)
    nope = kv.head_dim - value.head_dim
    shared_TQD = shared_TD[:, None].repeat(kv_TQN.shape[1], axis=1)
    k_TQD = np.concatenate([kv_TQN[..., :nope], shared_TQD], axis=-1)
    return np.asarray(attend(q_TN.reshape(len(x_TH), -1, last.head_dim), k_TQD, kv_TQN[..., nope:]) @ get.one(out).T)


def _delta_net(x_TH: Array, get: Weights, part: Mixer, config: Mapping[str, Any]) -> Array:
    """A state a value head: it decays, takes up what of a value its key does not give yet, and is read by a query."""
    named = {one.name.rpartition(".")[2]: one for one in part.parts if isinstance(one, Linear)}
    key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    group = config["linear_num_value_heads"] // config["linear_num_key_heads"]

    def rows(matrix: Array) -> Array:
        return x_TH @ matrix.T / 64

    if "in_proj_qkvz" in named:  # all that belongs to a key head is together
        qkvz = rows(get.one(named["in_proj_qkvz"])).reshape(TOKENS, -1, 2 * key_dim + 2 * group * value_dim)
        q, k, v, z = np.split(qkvz, np.cumsum([key_dim, key_dim, group * value_dim]), axis=2)
        ba = rows(get.one(named["in_proj_ba"])).reshape(TOKENS, -1, 2 * group)
        b, a = (one.reshape(TOKENS, -1) for one in np.split(ba, 2, axis=2))
    else:
        found = get.parts(named["in_proj_qkv"])
        q, k = (rows(found[label]).reshape(TOKENS, -1, key_dim) for label in "qk")
        v, z = rows(found["v"]), rows(get.one(named["in_proj_z"]))
        b, a = (rows(get.one(named[f"in_proj_{label}"])) for label in "ba")
    v_TVD, z_TVD = (one.reshape(TOKENS, -1, value_dim) for one in (v, z))
    times = v_TVD.shape[1] // q.shape[1]
    q_TVD, k_TVD = (np.tanh(one).repeat(times, axis=1) for one in (q, k))
    take, keep = (1 / (1 + np.exp(-one)) for one in (b, a))
    state, read = np.zeros((v_TVD.shape[1], key_dim, value_dim)), np.zeros_like(v_TVD)
    for t in range(TOKENS):
        state *= keep[t][:, None, None]
        new = v_TVD[t] - np.einsum("vk,vkd->vd", k_TVD[t], state)
        state += np.einsum("v,vk,vd->vkd", take[t], k_TVD[t], new)
        read[t] = np.einsum("vk,vkd->vd", q_TVD[t], state) * np.tanh(z_TVD[t])
    return np.asarray(read.reshape(TOKENS, -1) @ get.one(named["out_proj"]).T)
