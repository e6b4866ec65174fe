"""Dropout masks, and DoRA's norm and magnitude."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inlay.kernels import dora_norm, row_norm_squares
from inlay.kernels.dropout import keep_mask
from kernel_cases import SCALE, check, fused, gradients, leaves, make_tensors


@pytest.mark.parametrize("p", [0.01, 0.1, 0.37, 0.5, 0.9, 0.998])
def test_dropout_probability_is_exact(p: float) -> None:
    torch.manual_seed(11)
    x = torch.empty(4096, 1000)
    keep = keep_mask(x, p)
    assert keep.dtype == torch.int8 and set(keep.unique().tolist()) <= {-1, 0}
    drawn = (keep == 0).double()
    deviation = (p * (1 - p) / drawn.numel()) ** 0.5
    assert abs(drawn.mean().item() - p) < 5 * deviation + 5 / 512 / 4096**0.5
    columns = drawn.mean(0)
    assert (columns - p).abs().max() < 5.5 * (p * (1 - p) / 4096) ** 0.5


def test_dropped_elements_are_independent() -> None:
    torch.manual_seed(12)
    p = 0.3
    drawn = (keep_mask(torch.empty(4000, 512), p) == 0).double() - p
    deviation = p * (1 - p) / drawn.numel() ** 0.5
    for lag in (1, 2, 7, 8, 64, 511):
        assert abs((drawn[:, lag:] * drawn[:, :-lag]).sum() / drawn.numel()) < 5 * deviation, lag
        assert abs((drawn[lag:] * drawn[:-lag]).sum() / drawn.numel()) < 5 * deviation, lag


def test_masks_follow_the_seed() -> None:
    x = torch.empty(3, 5, 33)
    torch.manual_seed(7)
    first, second = keep_mask(x, 0.5), keep_mask(x, 0.5)
    torch.manual_seed(7)
    assert torch.equal(keep_mask(x, 0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_impossible_dropout_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="dropout probability must be in"):
        keep_mask(torch.empty(2, 2), p)


def test_dropout_keeps_the_expectation_of_dora() -> None:
    """HF PEFT also drops the input of the base product; only the expectation is shared."""
    tensors = leaves(make_tensors(shape=(2, 24)), set())
    many = {**tensors, "x": tensors["x"].expand(10_000, 2, 24)}
    torch.manual_seed(0)
    mean = fused(many, 0.3, dora=True).mean(0)
    torch.testing.assert_close(mean, fused(tensors, 0.0, dora=True), rtol=0.0, atol=0.05)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_dora_norm(dtype: torch.dtype, cached: bool, transposed: bool) -> None:
    tensors = make_tensors(shape=(1, 300), out=700, r=16, dtype=dtype, master=torch.float32)
    weight, a, b = tensors["weight"], tensors["a"], tensors["b"]
    if transposed:
        weight = weight.T.contiguous().T
    norm = dora_norm(weight, a, b, SCALE, row_norm_squares(weight) if cached else None)
    truth = (weight.double() + SCALE * b.double() @ a.double()).norm(dim=1)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not norm.requires_grad
    torch.testing.assert_close(norm.double(), truth, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("left", [0.5, 1e-2, 1e-4, 0.0])
def test_dora_norm_where_the_delta_cancels_the_weight(left: float) -> None:
    """scale B A = -(1 - left) W: the expansion alone would return noise."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 64), torch.randn(96, 4)
    weight = -(b @ a) * 2.0
    b = b * (1.0 - left)
    truth = (weight.double() + 2.0 * b.double() @ a.double()).norm(dim=1)
    rounding_of_terms = 2e-6 * weight.norm(dim=1).max()
    assert (dora_norm(weight, a, b, 2.0) - truth).abs().max() <= 1e-5 * truth.max() + rounding_of_terms


def test_rows_of_norm_zero_start_as_the_identity() -> None:
    """A pruned row has norm 0 at the start; PEFT divides by it."""
    tensors = make_tensors()
    tensors["weight"][3] = 0.0
    tensors["b"].zero_()
    tensors["magnitude"] = tensors["weight"].norm(dim=1)
    mine = leaves(tensors, {"x", "a", "b", "magnitude"})
    y = fused(mine, 0.0, dora=True)
    torch.testing.assert_close(y, nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"]))
    grads = gradients(y, mine, {"x", "a", "b", "magnitude"})
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert grads["b"][3].abs().max() > 0


@pytest.mark.parametrize("size", [0.0, 1e-6, -1.0])
def test_gradient_of_a_vanishing_or_negative_magnitude(size: float) -> None:
    tensors = make_tensors()
    tensors["magnitude"][::2] = size
    check(tensors, {"x", "a", "b", "magnitude"}, 0.3, dora=True, tolerance=1e-10)
