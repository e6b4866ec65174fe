"""Activations under MindPet's names: its numbers, in every dtype, and modules and functions in their place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from inlay.mindpet import AdapterLayer, LoRADense
from inlay.mindpet.activations import NAMES, activation_module

ON_A_ROW = sorted({*NAMES} - {"rrelu", "softmax2d", "threshold"})


def activation(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return activation_module("Layer", "activation", name, dtype)


def test_the_names_are_mindpets(shared: Path) -> None:
    folder = shared / "goldens" / "mindpet"
    told = json.loads((folder / "activations.json").read_text())["activations"]
    assert sorted(told) == sorted(NAMES) and len(NAMES) == 25
    stored = np.load(folder / "activations.npz")
    assert {key.split(".")[0] for key in stored if "." in key} == set(ON_A_ROW)
    trained = {name for name in ON_A_ROW if list(activation(name).parameters())}
    assert trained == {name for name, facts in told.items() if facts.get("trainable")} == {"prelu"}


@pytest.mark.parametrize("name", ON_A_ROW)
def test_values_and_gradients_are_mindpets(shared: Path, name: str) -> None:
    stored = np.load(shared / "goldens" / "mindpet" / "activations.npz")
    for dtype, atol, atol_grad, suffix in (
        (torch.float64, 1e-12, 1e-7, "64"),
        (torch.float32, 1e-5, 1e-5, "64" if "tanh" in name or name == "mish" else ""),
    ):
        x = torch.from_numpy(stored["x"]).to(dtype).requires_grad_()
        y = activation(name, dtype)(x)
        (grad,) = torch.autograd.grad((y * torch.from_numpy(stored["gy"])).sum(), x)
        assert y.dtype == dtype
        np.testing.assert_allclose(y.detach(), stored[f"{name}.out{suffix}"], atol=atol, rtol=0)
        np.testing.assert_allclose(grad, stored[f"{name}.grad{suffix}"], atol=atol_grad, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "threshold"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """The slope of prelu is float32 here, and must not widen what it multiplies."""
    x = torch.linspace(-4, 4, 24, dtype=dtype).view(2, 3, 4).requires_grad_()
    module = activation(name).eval()
    y = module(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), module(x.float()), atol=2e-2, rtol=2e-2)
    y.float().square().sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_gelu_and_leakyrelu_are_not_pytorchs_defaults() -> None:
    x = torch.tensor([-2.0, 0.5])
    assert (activation("gelu")(x) - nn.functional.gelu(x)).abs().max() > 1e-5
    assert activation("leakyrelu")(x).tolist() == [pytest.approx(-0.4), 0.5]


def test_rrelu_draws_in_training_and_repeats_itself_afterwards() -> None:
    x = -torch.ones(1000)
    module = activation("rrelu")
    slopes = -module(x)
    assert slopes.min() >= 1 / 8 and slopes.max() <= 1 / 3 and slopes.std() > 0.05
    module.eval()
    torch.testing.assert_close(-module(x), torch.full((1000,), 11 / 48))


def test_softmax2d_is_over_the_third_dimension_from_the_end() -> None:
    y = activation("softmax2d")(torch.randn(2, 3, 4, 5))
    torch.testing.assert_close(y.sum(1), torch.ones(2, 4, 5))


@pytest.mark.parametrize("given", [nn.Threshold(0.1, 20.0), nn.functional.softplus, torch.tanh, lambda x: x.square() + 1])  # fmt: skip
def test_modules_and_functions(given: nn.Module) -> None:
    layer = LoRADense(4, 3, 2, 4, activation=given)
    plain = LoRADense(4, 3, 2, 4)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 4)
    torch.testing.assert_close(layer(x), given(plain(x)))
    adapter = AdapterLayer(4, 2, non_linearity=given)
    down, _, up = adapter.mindpet_delta_adapter_block
    torch.testing.assert_close(adapter(x), x + up(given(down(x))))
    assert repr(adapter)


def test_prelu_is_trained() -> None:
    layer = AdapterLayer(8, 4, "prelu", param_init_type=torch.float64, compute_dtype=torch.float64)
    slope = layer.get_parameter("mindpet_delta_adapter_block.mindpet_delta_adapter_non_linear.weight")
    assert slope.dtype == torch.float64 and slope.tolist() == [0.25]
    layer(torch.randn(5, 8).double()).square().sum().backward()
    assert slope.grad is not None and slope.grad.abs().item() > 0
