"""Quantised weights of every format, packed by the formats' own definitions (see ``packing``)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unit.packing import (
    ONE,
    Held,
    Index,
    Matrix,
    Packer,
    ceil,
    e4m3,
    expanded,
    factors,
    randint,
    unpacked,
    words,
)

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])


def fp8(out: int, inp: int, scale: str = "weight_scale_inv", ue8m0: bool = False, **config: Any) -> Packer:
    def pack(n: int, k: int, rng: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        weight, scales = e4m3(n, k, rng), factors((ceil(n, out), ceil(k, inp)), rng)
        scales = scales.to(torch.float8_e8m0fnu) if ue8m0 else scales
        return {".weight": weight, f".{scale}": scales}, weight.float() * expanded(scales, out, inp, n, k)

    def read(held: Held, n: Index, k: Index) -> Matrix:
        return held("weight", n, k) * held(scale, n // out, k // inp)

    config = {"quant_method": "fp8", "weight_block_size": [out, inp], "activation_scheme": "dynamic", **config}
    return Packer(config, ("weight", (0, 1), (1, 1)), pack, read)


def fp8_tensor(scale: str, activation: str, **config: Any) -> Packer:
    def pack(n: int, k: int, rng: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        weight, one, other = e4m3(n, k, rng), factors((), rng), factors((), rng)
        return {".weight": weight, f".{scale}": one, f".{activation}": other}, weight.float() * one

    def read(held: Held, n: Index, k: Index) -> Matrix:
        assert held(activation, ONE) >= 0.5
        return held("weight", n, k) * held(scale, ONE)

    config = {"quant_method": "fp8", "activation_scheme": "static", **config}
    return Packer(config, ("weight", (0, 1), (1, 1)), pack, read)


def four_bits(n: int, k: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random codes, two a byte, and what they stand for."""
    values = randint(16, (n, k), rng)
    pairs = torch.nn.functional.pad(values, (0, k % 2)).unflatten(1, (-1, 2))
    return (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8), torch.from_numpy(E2M1)[values]


def modelopt_nvfp4(n: int, k: int, rng: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    (packed, numbers), one = four_bits(n, k, rng), factors((), rng)
    scales = factors((n, ceil(k, 16)), rng).to(torch.float8_e4m3fn)
    tensors = {".weight": packed, ".weight_scale": scales, ".weight_scale_2": one, ".input_scale": factors((), rng)}
    return tensors, numbers * (expanded(scales, 1, 16, n, k) * one)


def read_modelopt_nvfp4(held: Held, n: Index, k: Index) -> Matrix:
    assert held("input_scale", ONE) >= 0.5
    nibbles = unpacked(held("weight", n, k // 2).astype(np.int64), k % 2, 4, 1)
    return E2M1[nibbles] * (held("weight_scale", n, k // 16) * held("weight_scale_2", ONE))


def packed_mxfp4(n: int, k: int, rng: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    (packed, numbers), scales = four_bits(n, k, rng), 120 + randint(12, (n, ceil(k, 32)), rng)
    tensors = {".weight_packed": packed, ".weight_scale": scales.to(torch.uint8)}
    return tensors, numbers * expanded(2.0 ** (scales - 127), 1, 32, n, k)


def read_packed_mxfp4(held: Held, n: Index, k: Index) -> Matrix:
    nibbles = unpacked(held("weight_packed", n, k // 2).astype(np.int64), k % 2, 4, 1)
    return E2M1[nibbles] * 2.0 ** (held("weight_scale", n, k // 32).astype(np.float32) - 127)


def awq(group: int) -> Packer:
    def pack(n: int, k: int, rng: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        per = k if group == -1 else group
        values, zeros = randint(16, (k, n), rng), randint(16, (ceil(k, per), n), rng)
        scales = factors(tuple(zeros.shape), rng).half()
        tensors = {
            ".qweight": words(values, 4, 1, AWQ_ORDER),
            ".qzeros": words(zeros, 4, 1, AWQ_ORDER),
            ".scales": scales,
        }
        matrix = (values.float() - expanded(zeros, per, 1, k, n)) * expanded(scales, per, 1, k, n)
        return tensors, matrix.T

    def read(held: Held, n: Index, k: Index) -> Matrix:
        groups, places = k * 0 if group == -1 else k // group, np.argsort(AWQ_ORDER)[n % 8]
        values = unpacked(held("qweight", k, n // 8), places, 4, 1)
        zeros = unpacked(held("qzeros", groups, n // 8), places, 4, 1)
        return ((values - zeros).astype(np.float32) * held("scales", groups, n)).T

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Packer(config, ("qweight", (1, 8), (0, 1)), pack, read)


def gptq(bits: int, group: int, ordered: bool = False, bias: bool = False) -> Packer:
    per_word = 32 // bits

    def pack(n: int, k: int, rng: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        per = k if group == -1 else group
        values, zeros = randint(1 << bits, (k, n), rng), 1 + randint((1 << bits) - 1, (ceil(k, per), n), rng)
        scales, groups = factors(tuple(zeros.shape), rng).half(), torch.arange(k) // per
        groups = groups[torch.randperm(k, generator=rng)] if ordered else groups
        tensors = {
            ".qweight": words(values, bits, 0),
            ".qzeros": words(zeros - 1, bits, 1),
            ".scales": scales,
            ".g_idx": groups.to(torch.int32),
            **({".bias": factors((n,), rng).half()} if bias else {}),
        }
        return tensors, ((values - zeros[groups]) * scales.float()[groups]).T

    def read(held: Held, n: Index, k: Index) -> Matrix:
        groups = held("g_idx", k)
        if not ordered:
            np.testing.assert_array_equal(groups, k * 0 if group == -1 else k // group)
        values = unpacked(held("qweight", k // per_word, n), k % per_word, bits, 0)
        zeros = unpacked(held("qzeros", groups, n // per_word), n % per_word, bits, 1) + 1
        return ((values - zeros).astype(np.float32) * held("scales", groups, n)).T

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": ordered, "sym": False}
    return Packer(config, ("qweight", (1, 1), (0, per_word)), pack, read)


def compressed(kind: str, **weights: Any) -> Packer:
    """By the library's own ``compress``; the matrix is what its ``decompress`` gives."""
    args = {"num_bits": 8, "type": "int", "symmetric": True, **weights}
    group, block = args.get("group_size"), args.get("block_structure")
    reordered, bits = args.get("actorder") == "group", args["num_bits"]
    scheme = {"targets": ["Linear"], "weights": args}
    if kind != "pack-quantized":
        scheme["input_activations"] = {"num_bits": 8, "type": args["type"], "dynamic": False, "strategy": "tensor"}
    if kind.startswith("nvfp4"):
        scheme["input_activations"] = {**args, "dynamic": "local"}

    def pack(n: int, k: int, rng: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        pytest.importorskip("compressed_tensors")
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        library = QuantizationScheme(**{**scheme, "weights": {**args, "actorder": None}})
        compressor = BaseCompressor.get_value_from_registry(kind)
        wide = k if group is None else ceil(k, group) * group  # the library takes whole groups alone
        weight = torch.randn((n, wide), generator=rng)
        weight[:, k:] = 0
        shape = {"tensor": (1,), "channel": (n, 1)}.get(args["strategy"])
        if shape is None:
            shape = (n, wide // group) if group else (ceil(n, block[0]), ceil(k, block[1]))
        state = {"weight": weight, "weight_scale": factors(shape, rng) / (32 if args["type"] == "int" else 1)}
        if not args["symmetric"]:
            top = 1 << bits
            state["weight_zero_point"] = (randint(top, shape, rng) - top // 2).to(torch.int8)
        if kind.startswith("nvfp4"):
            state["weight_scale"] = state["weight_scale"].to(torch.float8_e4m3fn).float()
            state["weight_global_scale"] = 2.0 ** randint(4, (1,), rng)  # the library multiplies in bfloat16
        made = compressor.compress(state, library)
        whole = compressor.decompress(dict(made), library)["weight"].float()[:, :k]
        values = "weight_packed" if "weight_packed" in made else "weight"
        made[values] = made[values][:, : ceil(k * made[values].shape[1], wide)].contiguous()
        if "weight_shape" in made:
            made["weight_shape"] = torch.tensor([n, k])
        if reordered:  # the library no longer has it: inputs of groups in another order, by the old definition
            order = torch.randperm(k, generator=rng)
            made["weight_g_idx"] = (torch.arange(k) // group)[order].to(torch.int32)
            whole, inner = whole[:, order], unpack(made["weight_packed"], bits)[:, :k][:, order]
            made["weight_packed"] = words(inner, bits, 1)
        elif kind.startswith("nvfp4"):
            made["input_global_scale"] = factors((1,), rng)
        elif kind != "pack-quantized":
            made["input_scale"] = factors((1,), rng)
        return {f".{name}": tensor for name, tensor in made.items()}, whole

    read = partial(_read_compressed, kind=kind, args=args)
    per = {"pack-quantized": 32 // bits, "nvfp4-pack-quantized": 2}.get(kind, 1)
    values = "weight" if per == 1 else "weight_packed"
    config = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }
    return Packer(config, (values, (0, 1), (1, per)), pack, read)


def unpack(packed: Tensor, bits: int) -> Tensor:
    return ((packed.long()[..., None] >> (torch.arange(32 // bits) * bits)) & ((1 << bits) - 1)).flatten(-2)


def _read_compressed(held: Held, n: Index, k: Index, *, kind: str, args: Mapping[str, Any]) -> Matrix:
    bits, rows, cols = args["num_bits"], n, ONE
    if args["strategy"] == "tensor":
        rows = ONE
    elif args["strategy"] == "block":
        rows, cols = n // args["block_structure"][0], k // args["block_structure"][1]
    elif "group" in args["strategy"]:
        cols = held("weight_g_idx", k) if "weight_g_idx" in held else k // args["group_size"]
    scale = held("weight_scale") if rows is ONE else held("weight_scale", rows, cols)
    if kind.startswith("nvfp4"):
        nibbles = unpacked(held("weight_packed", n, k // 2).astype(np.int64), k % 2, 4, 1)
        return E2M1[nibbles] * (scale / held("weight_global_scale"))
    zeros: Any = 0
    if kind == "pack-quantized":
        per, middle = 32 // bits, 1 << (bits - 1)
        values = unpacked(held("weight_packed", n, k // per), k % per, bits, 1) - middle
        if not args["symmetric"]:
            zeros = unpacked(held("weight_zero_point", n // per, cols), n % per, bits, 0) - middle
    else:
        values = held("weight", n, k)
        if not args["symmetric"]:
            zeros = held("weight_zero_point") if rows is ONE else held("weight_zero_point", rows, cols)
            zeros = zeros.astype(np.int64)
    return (values - zeros).astype(np.float32) * scale


def mxfp4(n: int, k: int, rng: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """The blocks and scales of gpt-oss' experts, of one expert."""
    values, scales = randint(16, (n, k), rng), 120 + randint(12, (n, k // 32), rng)
    pairs = values.reshape(n, k // 32, 16, 2)
    blocks = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
    matrix = torch.from_numpy(E2M1)[values] * expanded(2.0 ** (scales - 127), 1, 32, n, k)
    return {"_blocks": blocks, "_scales": scales.to(torch.uint8)}, matrix


def read_mxfp4(held: Held, n: Index, k: Index) -> Matrix:
    blocks = held("weight", n, np.unique(k // 32)).astype(np.int64)
    nibbles = np.stack([blocks & 15, blocks >> 4], -1).reshape(len(n), -1)
    inside = k - k.min() // 32 * 32
    return E2M1[nibbles[:, inside]] * 2.0 ** (held("weight_scale", n, k // 32).astype(np.float32) - 127)


PACKERS: dict[str, Packer] = {
    "fp8": fp8(128, 128),
    "fp8 of other blocks": fp8(16, 8),
    "fp8 e8m0": fp8(32, 32, ue8m0=True, scale_fmt="ue8m0"),
    "fp8 by tensor": fp8_tensor("weight_scale_inv", "activation_scale", weight_block_size=None),
    "fp8 of vllm": fp8_tensor("weight_scale", "input_scale"),
    "awq": awq(32),
    "awq by channel": awq(-1),
    "gptq": gptq(4, 32),
    "gptq of 8 bits": gptq(8, 32),
    "gptq by channel": gptq(4, -1),
    "gptq in order of activation": gptq(4, 32, ordered=True, bias=True),
    "ct fp8 by channel": compressed("float-quantized", type="float", strategy="channel"),
    "ct fp8 by tensor": compressed("float-quantized", type="float", strategy="tensor"),
    "ct fp8 in blocks": compressed("float-quantized", type="float", strategy="block", block_structure=[64, 32]),
    "ct fp8 in groups": compressed("naive-quantized", type="float", strategy="group", group_size=32),
    "ct int8 by channel": compressed("int-quantized", strategy="channel"),
    "ct int8 by tensor": compressed("int-quantized", strategy="tensor", symmetric=False),
    "ct int8 with zeros": compressed("int-quantized", strategy="channel", symmetric=False),
    "ct int4": compressed("pack-quantized", num_bits=4, strategy="group", group_size=32),
    "ct int4 with zeros": compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False),
    "ct int4 by channel": compressed("pack-quantized", num_bits=4, strategy="channel", symmetric=False),
    "ct int8 packed": compressed("pack-quantized", strategy="group", group_size=64),
    "ct int4 in order of activation": compressed(
        "pack-quantized", num_bits=4, strategy="group", group_size=32, actorder="group"
    ),
    "ct nvfp4": compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    "ct mxfp4": Packer(
        {
            "quant_method": "compressed-tensors",
            "format": "mxfp4-pack-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
                }
            },
            "ignore": ["lm_head", "re:.*mlp.gate$"],
        },
        ("weight_packed", (0, 1), (1, 2)),
        packed_mxfp4,
        read_packed_mxfp4,
    ),
    "modelopt nvfp4": Packer(
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*.mlp.gate"]},
        ("weight", (0, 1), (1, 2)),
        modelopt_nvfp4,
        read_modelopt_nvfp4,
    ),
}
"""By what a test calls them."""
