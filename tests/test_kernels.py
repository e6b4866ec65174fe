"""The fused LoRA and DoRA functions against plain float64 formulas."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from inlay.kernels import dora_linear, dora_norm, lora_linear
from kernel_cases import EVERYTHING, NAMES, SCALE, check, fused, gradients, leaves, make_tensors


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize(
    ("dtype", "master"),
    [
        (torch.float64, None),
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_matches_the_formula(
    dtype: torch.dtype, master: torch.dtype | None, bias: bool, p: float, dora: bool
) -> None:
    needed = EVERYTHING | ({"magnitude"} if dora else set())
    check(make_tensors(dtype=dtype, master=master, bias=bias), needed, p, dora)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_any_subset_of_inputs_may_need_a_gradient(dora: bool, p: float) -> None:
    names = NAMES if dora else NAMES[:5]
    for count in range(len(names) + 1):
        for needed in itertools.combinations(names, count):
            check(make_tensors(), set(needed), p, dora)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (2, 2, 3, 24), (0, 24), (2, 0, 24)], ids=str)
def test_any_number_of_dimensions(shape: tuple[int, ...], p: float, dora: bool) -> None:
    check(make_tensors(shape=shape), EVERYTHING | ({"magnitude"} if dora else set()), p, dora)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_blocks_of_rows_add_up(p: float, dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inlay.kernels.low_rank._BLOCK_BYTES_PER_THREAD", 1)
    check(make_tensors(shape=(53, 24)), EVERYTHING | ({"magnitude"} if dora else set()), p, dora)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_rank_one_and_odd_sizes(p: float, dora: bool) -> None:
    check(make_tensors(shape=(3, 7), out=5, r=1), EVERYTHING | ({"magnitude"} if dora else set()), p, dora)
    check(make_tensors(shape=(3, 1), out=1, r=1), EVERYTHING | ({"magnitude"} if dora else set()), p, dora)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_strided_inputs_and_gradients(p: float, dora: bool) -> None:
    """x and dY as attention hands them over, W as GPT-2 stores it, and the dY of a plain sum."""
    tensors = make_tensors(shape=(4, 6, 24))
    needed = EVERYTHING | ({"magnitude"} if dora else set())
    dense = leaves(tensors, needed)
    strided = dict(dense)
    strided["x"] = dense["x"].detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    strided["weight"] = dense["weight"].detach().T.contiguous().T.requires_grad_()
    assert not strided["x"].is_contiguous() and not strided["weight"].is_contiguous()
    wanted, got = [], []
    for inputs, results in ((dense, wanted), (strided, got)):
        torch.manual_seed(3)
        y = fused(inputs, p, dora)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(6, 20, 4).permute(2, 0, 1)
        results += [y, *gradients((y * weights).sum(), inputs, needed).values()]
        results += gradients(fused(inputs, 0.0, dora).sum(), inputs, needed).values()
    for one, other in zip(wanted, got, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_lora_bias_is_scaled_and_trained() -> None:
    tensors = leaves(make_tensors(bias=False), set())
    shift = torch.randn(20, dtype=torch.float32, requires_grad=True)
    x, weight, _, a, b, _ = (tensors[name] for name in NAMES)
    for bias in (None, torch.ones(20, dtype=torch.float64)):
        y = lora_linear(x, weight, bias, a, b, SCALE, lora_bias=shift)
        torch.testing.assert_close(y, lora_linear(x, weight, bias, a, b, SCALE) + SCALE * shift)
        (grad,) = torch.autograd.grad(y.sum(), shift)
        torch.testing.assert_close(grad, torch.full((20,), 12 * SCALE))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_first_and_second_derivatives(p: float, dora: bool) -> None:
    names = NAMES if dora else NAMES[:5]
    tensors = leaves(make_tensors(shape=(2, 3, 5), out=4, r=2), set(names))
    norm = dora_norm(tensors["weight"], tensors["a"], tensors["b"], SCALE)

    def function(*inputs: Tensor) -> Tensor:
        torch.manual_seed(1)
        if dora:
            return dora_linear(*inputs, scale=SCALE, dropout_p=p, weight_norm=norm)
        return lora_linear(*inputs, scale=SCALE, dropout_p=p)

    inputs = [tensors[name] for name in names]
    # A second backward through DoRA's graph recomputes the output, which rounds differently.
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(function, inputs, nondet_tol=1e-12)


def test_second_derivative_of_the_input_alone() -> None:
    """A gradient penalty on a frozen adapter: x is not kept, and not needed."""
    tensors = leaves(make_tensors(), {"x"})
    y = fused(tensors, 0.0, dora=False)
    (dx,) = torch.autograd.grad(y.square().sum(), tensors["x"], create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), tensors["x"])
    merged = tensors["weight"] + SCALE * tensors["b"] @ tensors["a"]
    truth = 2 * (2 * y @ merged) @ (2 * merged.T @ merged)
    torch.testing.assert_close(second, truth.detach())


def test_second_derivative_with_frozen_a_is_refused() -> None:
    tensors = leaves(make_tensors(), {"x", "b"})
    y = fused(tensors, 0.0, dora=False)
    with pytest.raises(RuntimeError, match="let lora_A require a gradient"):
        torch.autograd.grad(y.square().sum(), [tensors["x"], tensors["b"]], create_graph=True)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_inputs_stay_as_they_are(p: float, dora: bool) -> None:
    needed = EVERYTHING | ({"magnitude"} if dora else set())
    tensors = leaves(make_tensors(dtype=torch.float32), needed)
    before = {name: t.detach().clone() for name, t in tensors.items()}
    y = fused(tensors, p, dora)
    dy = torch.ones_like(y)
    y.backward(dy)
    assert torch.equal(dy, torch.ones_like(dy))
    for name, t in tensors.items():
        assert torch.equal(t, before[name]), name


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_output_may_be_changed_in_place(dora: bool) -> None:
    """`nn.Linear` followed by ReLU(inplace=True) works, so these must."""
    needed = EVERYTHING | ({"magnitude"} if dora else set())
    tensors = make_tensors()
    results = []
    for activation in (nn.ReLU(inplace=False), nn.ReLU(inplace=True)):
        mine = leaves(tensors, needed)
        results.append(gradients(activation(fused(mine, 0.0, dora)), mine, needed))
    for name, want in results[0].items():
        torch.testing.assert_close(results[1][name], want, rtol=1e-12, atol=1e-12, msg=name)
