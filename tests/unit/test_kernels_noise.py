"""The sampling noise: known values, and sampling by it in plain torch."""

from __future__ import annotations

import torch

from tpctl.kernels.common.noise import gumbel_reference, noise_hash_reference, sample_reference


def mix(x: int) -> int:
    mask = 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x7FEB352D & mask
    x ^= x >> 15
    x = x * 0x846CA68B & mask
    return x ^ x >> 16


def test_hash_is_the_definition() -> None:
    ids = torch.tensor([0, 1, 77, 151935, 2**31 - 1])
    for key0, key1 in ((0, 0), (1, 2), (2**32 - 1, 0x12345678)):
        want = [mix(mix((v * 0x9E3779B9 + key0) % 2**32) ^ key1) for v in ids.tolist()]
        assert noise_hash_reference(ids, torch.tensor(key0), torch.tensor(key1)).tolist() == want


def test_gumbel_is_finite_at_the_ends() -> None:
    noise = gumbel_reference(torch.tensor([0, 1, 2**31, 2**32 - 1]))
    assert torch.isfinite(noise).all()
    assert noise[0] > 22
    assert noise[3] < -2.7


def test_slices_of_the_vocabulary_agree_with_the_whole() -> None:
    logits = torch.randn(16, 300)
    temperatures = torch.rand(16) + 0.1
    temperatures[::3] = 0
    keys = torch.randint(0, 2**32, (16, 2))
    score, token = sample_reference(logits, temperatures, keys)
    halves = [sample_reference(logits[:, a:b], temperatures, keys, vocab_start=a) for a, b in ((0, 160), (160, 300))]
    first = halves[0][0] >= halves[1][0]
    assert torch.equal(torch.where(first, halves[0][1], halves[1][1]), token)
    assert torch.equal(torch.maximum(halves[0][0], halves[1][0]), score)
    assert torch.equal(token[::3], logits[::3].argmax(1))


def test_frequencies_follow_the_softmax() -> None:
    rows = 20000
    weights = torch.tensor([0.5, 0.3, 0.2])
    keys = torch.randint(0, 2**32, (rows, 2), generator=torch.Generator().manual_seed(0))
    logits = (weights.log() * 0.7).expand(rows, 3)
    token = sample_reference(logits, torch.full((rows,), 0.7), keys)[1]
    assert (torch.bincount(token, minlength=3) / rows - weights).abs().max() < 4 / rows**0.5
