"""LoRADense is the library's own LoRA: the same kernel, the same numbers bit for bit, dropout included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import inlay.mindpet.lora
from inlay import LoraConfig, get_peft_model
from inlay.kernels.lora_linear import lora_linear
from inlay.mindpet import LoRADense

A, B = "mindpet_delta_lora_a", "mindpet_delta_lora_b"


def filled(dropout: float = 0.0, **settings: object) -> LoRADense:
    layer = LoRADense(40, 24, 4, 6, dropout, **settings)  # type: ignore[arg-type]
    nn.init.normal_(layer.mindpet_delta_lora_b)
    return layer


def gradients(y: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return dict(zip(named, torch.autograd.grad(y, list(named.values()), dy), strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_adapted_layer(dropout: float, training: bool) -> None:
    layer = filled(dropout).train(training)
    base = nn.Linear(40, 24)
    base.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules=["0"])
    model = get_peft_model(nn.Sequential(base), config).train(training)
    adapted = model.get_submodule("base_model.model.0")
    adapted.lora_A.default.weight.data.copy_(layer.mindpet_delta_lora_a.detach())
    adapted.lora_B.default.weight.data.copy_(layer.mindpet_delta_lora_b.detach())
    x = torch.randn(3, 50, 40)
    found, wanted = [], []
    for forward, a, b, into in (
        (layer, layer.mindpet_delta_lora_a, layer.mindpet_delta_lora_b, found),
        (model, adapted.lora_A.default.weight, adapted.lora_B.default.weight, wanted),
    ):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        y = forward(leaf)
        into += [y, *gradients(y, {"x": leaf, "a": a, "b": b}).values()]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))
    assert (dropout > 0 and training) is not torch.equal(layer(x), layer(x))


def test_it_runs_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: object) -> Tensor:
        calls.append(args[6])
        return lora_linear(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(inlay.mindpet.lora, "lora_linear", counted)
    layer = filled(0.25)
    layer(torch.randn(2, 40))
    layer.eval()(torch.randn(2, 40))
    assert calls == [0.25, 0.0]


def test_only_the_update_sees_dropout() -> None:
    layer = filled(0.5)
    nn.init.zeros_(layer.mindpet_delta_lora_b)
    x = torch.randn(4, 40)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_dropout_keeps_the_expectation() -> None:
    layer = filled(0.3)
    x = torch.randn(2, 40)
    mean = layer(x.expand(20_000, 2, 40)).mean(0)
    torch.testing.assert_close(mean, layer.eval()(x), atol=0.15, rtol=0)


def test_the_activation_comes_after_the_update() -> None:
    layer = filled(activation="relu")
    x = torch.randn(4, 40)
    delta = 1.5 * x @ layer.mindpet_delta_lora_a.T @ layer.mindpet_delta_lora_b.T
    wanted = torch.relu(nn.functional.linear(x, layer.weight, layer.bias) + delta)
    torch.testing.assert_close(layer(x), wanted)
    assert not torch.allclose(wanted, torch.relu(wanted - delta) + delta)


def test_default_computation_does_not_overflow() -> None:
    """MindPet's default dtype, float16, does: 3e4 becomes inf."""
    x = torch.full((1, 40), 3e4)
    settings = {"weight_init": "ones", "bias_init": "zeros"}
    assert torch.isfinite(filled(**settings)(x)).all()
    assert not torch.isfinite(filled(**settings, compute_dtype=torch.float16)(x)).all()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_without_a_graph_break(dropout: float) -> None:
    torch.compiler.reset()
    layer = filled(dropout)
    x = torch.randn(2, 5, 40, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    if not dropout:
        named = dict(layer.named_parameters()) | {"x": x}
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        torch.testing.assert_close(gradients(y, named), gradients(layer(x), named))
        return
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    nn.init.zeros_(layer.mindpet_delta_lora_b)
    torch.testing.assert_close(compiled(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_under_torch_func() -> None:
    layer = filled()
    x = torch.randn(5, 40)
    values = dict(layer.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    grads = torch.func.grad(loss)(values)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, atol=1e-4, rtol=1e-5)


def test_gradients_twice() -> None:
    layer = filled(compute_dtype=torch.float64, param_init_type=torch.float64)
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_frozen_base_gets_no_gradient() -> None:
    layer = filled()
    layer.weight.requires_grad_(False)
    layer(torch.randn(3, 40)).sum().backward()
    assert layer.weight.grad is None
    assert all(getattr(layer, name).grad.abs().sum() > 0 for name in (A, B))
