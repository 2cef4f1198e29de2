"""Numbers, scales and packing of quantised weights are compressed-tensors', to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tpctl.errors import CheckpointError
from tpctl.quantizing.rounding import Loss, _e4m3, _indices, _table, check_finite, elements, quantise_rows
from tpctl.quantizing.schemes import SCHEMES, Method

torch = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")

from tests.unit.quantising import quantised  # noqa: E402

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FINITE = {"BF16": (0x7F80, "<u2"), "F16": (0x7C00, "<u2"), "F32": (0x7F800000, "<u4")}


def as_torch(bits: np.ndarray[Any, Any], dtype: str) -> Any:
    return torch.from_numpy(bits.copy().view(np.uint8)).view(TORCH[dtype])


@st.composite
def weights(draw: st.DrawFn, dtype: str, method: Method) -> np.ndarray[Any, Any]:
    """Bits of a weight: like trained ones, any finite patterns, or half way between the numbers; with rows of zeros."""
    rows = draw(st.integers(1, 130 if method is Method.FP8_BLOCK else 5))
    columns = 128 * draw(st.integers(1, 3))
    if SCHEMES[method].kind != "int":
        columns = max(1, columns - draw(st.sampled_from([0, 1, 56, 127])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    infinity, element = FINITE[dtype]
    kind = draw(st.sampled_from(["trained", "patterns", "halves"]))
    if kind == "patterns":
        low, high = sorted(draw(st.tuples(st.integers(0, infinity - 1), st.integers(0, infinity - 1))))
        bits = rng.integers(low, high + 1, (rows, columns)).astype(element)
        bits |= (rng.integers(0, 2, bits.shape) << (8 * bits.itemsize - 1)).astype(element)
    else:
        size = 2.0 ** draw(st.integers(-20, 10))
        values = rng.standard_normal((rows, columns)) * size
        if kind == "halves":
            values = rng.integers(-15, 16, values.shape) * (size / 2)
            values[:, 0] = 7.5 * size
        tensor = torch.from_numpy(values).to(TORCH[dtype])
        bits = tensor.view(torch.uint8).numpy().view(element)
    if draw(st.booleans()):
        bits[rng.integers(0, rows)] = rng.choice([0, 1 << (8 * bits.itemsize - 1)], columns)
    return np.ascontiguousarray(bits)


@pytest.mark.parametrize("dtype", FINITE)
@pytest.mark.parametrize("method", Method)
@settings(max_examples=60)
@given(st.data())
def test_rows_are_compressed_tensors_own(method: Method, dtype: str, data: st.DataObject) -> None:
    bits = data.draw(weights(dtype, method))
    numbers, scales = quantised(as_torch(bits, dtype), method)
    step = 128 if method is Method.FP8_BLOCK else len(bits)
    largest = 8.0 if SCHEMES[method].kind == "int" else 448.0
    assume(float(scales.max()) * largest <= torch.finfo(TORCH[dtype]).max)  # else it is refused
    bands = [quantise_rows(bits[row : row + step], dtype, SCHEMES[method], "w") for row in range(0, len(bits), step)]
    assert b"".join(band.scales.tobytes() for band in bands) == scales.view(torch.uint8).numpy().tobytes()
    assert b"".join(band.numbers.tobytes() for band in bands) == numbers.view(torch.uint8).numpy().tobytes()
    loss = sum((band.loss for band in bands), Loss())
    assert np.isfinite([loss.difference, loss.value, loss.largest]).all()


def test_the_nearest_e4m3_of_every_short_float_is_torchs() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        values = values[torch.isfinite(values)]
        wanted = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        assert (_e4m3(values.float().numpy()) == wanted).all()


@pytest.mark.parametrize("kind", ["float", "int"])
def test_a_float32_is_rounded_once(kind: str) -> None:
    """Also next to the middle of two numbers, where rounding to bfloat16 first would go wrong."""
    numbers = np.unique(_table("F32", kind).view("<u4") & 0xFFFFFF00).astype("<u4").view("<f4")
    numbers = np.sort(numbers[np.isfinite(numbers)])
    middles = (numbers[1:] + numbers[:-1]) / 2
    near = [middles, np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(-np.inf)), numbers]
    rng = np.random.default_rng(0)
    values = np.concatenate([*near, rng.standard_normal(100_000).astype("<f4") * 4]).astype("<f4")
    if kind == "float":
        wanted = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        wanted = np.where(np.signbit(values) & (values == 0), 0, wanted)
    else:
        wanted = torch.from_numpy(values).clamp(-8, 7).round().numpy() + 8
    assert ((_table("F32", kind)[_indices(values.copy(), "F32")] & 0xFF) == wanted).all()


@pytest.mark.parametrize("dtype", FINITE)
@pytest.mark.parametrize("method", Method)
def test_the_loss_is_that_of_the_values_that_are_stored(method: Method, dtype: str) -> None:
    weight = (torch.randn(128, 384, generator=torch.Generator().manual_seed(1)) * 0.1).to(TORCH[dtype])
    bits = weight.view(torch.uint8).numpy().view(FINITE[dtype][1])
    loss = quantise_rows(bits, dtype, SCHEMES[method], "w").loss
    numbers, scales = quantised(weight, method)
    if SCHEMES[method].kind == "int":
        shifts = torch.arange(0, 32, 4)
        numbers = ((numbers.unsqueeze(-1) >> shifts) & 15).flatten(1) - 8
    scales = scales.double().repeat_interleave(384 // scales.shape[1], 1)
    difference = weight.double() - numbers.double() * scales
    assert loss.value == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    assert loss.difference == pytest.approx(float(difference.square().sum()), rel=1e-4)
    assert loss.largest == pytest.approx(float(difference.abs().max()), rel=1e-4)


def test_squares_beyond_float32_are_summed_too() -> None:
    for size in (1e30, 1e-30):
        weight = np.full((1, 256), size, "<f4")
        loss = quantise_rows(weight.view("<u4"), "F32", SCHEMES[Method.FP8], "w").loss
        assert loss.value == pytest.approx(256 * float(weight[0, 0]) ** 2, rel=1e-6)


@pytest.mark.parametrize("dtype", FINITE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_name(dtype: str, value: float) -> None:
    weight = torch.ones(2, 128, dtype=TORCH[dtype])
    weight[1, 77] = value
    data = weight.view(torch.uint8).numpy()
    for method in Method:
        with pytest.raises(CheckpointError, match=r"^some\.weight holds NaN or infinity"):
            quantise_rows(elements(data, dtype), dtype, SCHEMES[method], "some.weight")
    with pytest.raises(CheckpointError, match=r"^some\.weight holds NaN or infinity"):
        check_finite(elements(data, dtype), dtype, "some.weight")
    check_finite(elements(data[:1], dtype), dtype, "some.weight")


@pytest.mark.parametrize("dtype", FINITE)
@pytest.mark.parametrize("method", Method)
def test_what_rounding_would_make_infinite_is_refused(method: Method, dtype: str) -> None:
    largest = float(torch.finfo(TORCH[dtype]).max)
    for size, bad in ((largest, SCHEMES[method].kind == "int" or dtype != "F32"), (largest * 0.9, False)):
        weight = torch.full((1, 128), -size, dtype=TORCH[dtype])
        bits = elements(weight.view(torch.uint8).numpy(), dtype)
        if bad:
            with pytest.raises(CheckpointError, match=r"^w holds values so near to the largest \w+ \("):
                quantise_rows(bits, dtype, SCHEMES[method], "w")
        else:
            assert np.isfinite(quantise_rows(bits, dtype, SCHEMES[method], "w").loss.largest)
