"""The bottleneck as one autograd function against its formula: values, gradients, second derivatives, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from inlay.kernels.bottleneck import Narrow, Norm, bottleneck
from inlay.methods.bottleneck.activations import ACTIVATIONS, DERIVATIVES
from kernel_cases import TOLERANCE, relative_error

NAMES = ("x", "carried", "down", "down_bias", "up", "up_bias", "weight", "bias", "mix")
GAIN = 1.7


def make(
    shape: tuple[int, ...] = (3, 5, 24),
    dtype: torch.dtype = torch.float64,
    master: torch.dtype | None = None,
    rows: int = 1,
    carried: str = "itself",
    norm: bool = False,
    biases: bool = True,
) -> dict[str, Any]:
    """Return inputs by name; ``mix`` stands between the projections, whose sides have ``rows`` rows."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, to: torch.dtype | None = None) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(to or master or dtype)

    d, k = shape[-1], 4
    return {
        "x": draw(*shape, to=dtype),
        "carried": {"itself": "x", "other": draw(*shape, to=dtype), "nothing": None}[carried],
        "down": draw(k, d // rows) / 4,
        "down_bias": draw(rows * k) if biases else None,
        "up": draw(d // rows, k) / 4,
        "up_bias": draw(d) if biases else None,
        "weight": draw(d) if norm else None,
        "bias": draw(d) if norm else None,
        "mix": draw(rows * k, rows * k) / 2,
    }


def leaves(given: dict[str, Any], needed: set[str], dtype: torch.dtype | None = None) -> dict[str, Any]:
    return {
        n: t.detach().to(dtype or t.dtype).requires_grad_(n in needed) if isinstance(t, Tensor) else t
        for n, t in given.items()
    }


def between(s: Tensor, mix: Tensor) -> Tensor:
    return torch.tanh(s) @ mix


def fused(t: dict[str, Any]) -> Tensor:
    norm = None if t["weight"] is None else Norm(t["weight"], t["bias"], 1e-5)
    carried = t["x"] if isinstance(t["carried"], str) else t["carried"]
    narrow = Narrow(between, (t["mix"],))
    return bottleneck(t["x"], carried, t["down"], t["down_bias"], narrow, t["up"], t["up_bias"], GAIN, norm)


def formula(t: dict[str, Any]) -> Tensor:
    x = t["x"]
    d, rows = x.shape[-1], x.shape[-1] // t["down"].shape[1]
    inner = x if t["weight"] is None else F.layer_norm(x, (d,), t["weight"], t["bias"], 1e-5)
    whole = torch.block_diag(*[t["down"]] * rows), torch.block_diag(*[t["up"]] * rows)
    m = between(F.linear(inner, whole[0], t["down_bias"]), t["mix"])
    change = GAIN * F.linear(m, whole[1], t["up_bias"])
    carried = x if isinstance(t["carried"], str) else t["carried"]
    return change if carried is None else carried + change


def compare(given: dict[str, Any], needed: set[str]) -> None:
    ours, true = leaves(given, needed), leaves(given, needed, torch.float64)
    y, truth = fused(ours), formula(true)
    tolerance = TOLERANCE[y.dtype]
    assert y.dtype == given["x"].dtype and y.shape == truth.shape
    assert relative_error(y, truth) <= tolerance
    names = [n for n in NAMES if n in needed and isinstance(given[n], Tensor)]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = torch.autograd.grad(y, [ours[n] for n in names], dy.to(y.dtype))
    wanted = torch.autograd.grad(truth, [true[n] for n in names], dy)
    for name, a, b in zip(names, found, wanted, strict=True):
        assert a.dtype == given[name].dtype and a.shape == given[name].shape, name
        assert relative_error(a, b) <= 3 * tolerance, name


CARRIED = pytest.mark.parametrize("carried", ["itself", "other", "nothing"])
NORM = pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
ROWS = pytest.mark.parametrize("rows", [1, 3])


@CARRIED
@NORM
@ROWS
@pytest.mark.parametrize(
    ("dtype", "master"),
    [(torch.float64, None), (torch.float32, None), (torch.bfloat16, torch.float32), (torch.float16, None)],
)
def test_matches_the_formula(
    dtype: torch.dtype, master: torch.dtype | None, rows: int, norm: bool, carried: str
) -> None:
    compare(make(dtype=dtype, master=master, rows=rows, norm=norm, carried=carried), set(NAMES))


@CARRIED
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 2, 3, 24), (0, 24), (2, 0, 24)], ids=str)
def test_any_number_of_dimensions(shape: tuple[int, ...], carried: str) -> None:
    compare(make(shape, carried=carried, biases=len(shape) != 2), set(NAMES))


@CARRIED
@NORM
def test_any_subset_of_inputs_may_need_a_gradient(norm: bool, carried: str) -> None:
    given = make(norm=norm, carried=carried)
    names = [n for n in NAMES if isinstance(given[n], Tensor)]
    for name in names:
        compare(given, {name})
        compare(given, set(names) - {name})


@CARRIED
def test_strided_inputs_and_gradients(carried: str) -> None:
    given = make((4, 6, 24), carried=carried)
    for name in ("x", "carried"):
        if isinstance(given[name], Tensor):
            given[name] = given[name].transpose(0, 1)
    compare(given, set(NAMES))
    t = leaves(given, set(NAMES))
    (found,) = torch.autograd.grad(
        fused(t).sum(), t["up_bias"]
    )  # the gradient of a sum is an expanded number
    torch.testing.assert_close(found, torch.full_like(found, GAIN * 24))


@pytest.mark.parametrize("name", sorted(DERIVATIVES))
def test_derivatives_of_activations(name: str) -> None:
    x, dy = torch.randn(2, 50, dtype=torch.float64)
    x.requires_grad_()
    (wanted,) = torch.autograd.grad(ACTIVATIONS[name](x), x, dy)
    torch.testing.assert_close(DERIVATIVES[name](dy, x.detach()), wanted)


@pytest.mark.parametrize("needed", [{"x"}, {"up"}, {"x", "down", "down_bias", "up", "up_bias"}], ids=len)
def test_a_given_derivative_is_used(needed: set[str]) -> None:
    def run(derivative: Any) -> list[Tensor]:
        t = leaves(make(), needed)
        narrow = Narrow(ACTIVATIONS["gelu"], derivative=derivative)
        y = bottleneck(t["x"], t["x"], t["down"], t["down_bias"], narrow, t["up"], t["up_bias"], GAIN)
        return list(torch.autograd.grad(y.square().sum(), [t[n] for n in sorted(needed)]))

    for ours, plain in zip(run(DERIVATIVES["gelu"]), run(None), strict=True):
        torch.testing.assert_close(ours, plain)


@CARRIED
@NORM
def test_first_and_second_derivatives(norm: bool, carried: str) -> None:
    given = leaves(make((2, 3, 6), rows=3, norm=norm, carried=carried), set(NAMES))
    names = [n for n in NAMES if isinstance(given[n], Tensor)]

    def function(*values: Tensor) -> Tensor:
        return fused(given | dict(zip(names, values, strict=True)))

    inputs = tuple(given[n] for n in names)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_second_derivative_of_a_frozen_bottleneck_is_refused() -> None:
    t = leaves(make(), {"x"})
    with pytest.raises(RuntimeError, match="let adapter_down require a gradient"):
        torch.autograd.grad(fused(t).sum(), t["x"], create_graph=True)


@CARRIED
@NORM
@pytest.mark.parametrize("frozen", [False, True])
def test_of_wide_tensors_only_the_input_is_kept(frozen: bool, norm: bool, carried: str) -> None:
    t = leaves(make(norm=norm, carried=carried), {"x", "carried"} if frozen else set(NAMES))
    own = {v.untyped_storage().data_ptr() for n, v in t.items() if isinstance(v, Tensor) and n != "x"}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        fused(t)
    new = [v for v in kept if v.untyped_storage().data_ptr() not in own]
    wide = [v for v in new if v.shape == t["x"].shape]
    assert [v.data_ptr() for v in wide] == [t["x"].data_ptr()] * (norm or not frozen)
    assert sum(v.numel() for v in new if v.shape != t["x"].shape) == 3 * 5 * 4


@CARRIED
def test_inputs_and_gradients_stay_as_they_are(carried: str) -> None:
    t = leaves(make(norm=True, carried=carried), set(NAMES))
    copies = {n: v.detach().clone() for n, v in t.items() if isinstance(v, Tensor)}
    y = fused(t)
    dy = torch.randn_like(y)
    before = dy.clone()
    y.backward(dy)
    assert torch.equal(dy, before)
    assert all(torch.equal(t[n], value) for n, value in copies.items())
    with torch.no_grad():
        assert torch.equal(fused(t), y)


def test_the_output_may_be_changed_in_place() -> None:
    t = leaves(make(), set(NAMES))
    (found,) = torch.autograd.grad(fused(t).mul_(2.0).sum(), t["x"])
    (once,) = torch.autograd.grad(fused(t).sum(), t["x"])
    torch.testing.assert_close(found, 2 * once)
