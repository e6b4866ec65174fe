"""SHiRA: no wrong gradient, whatever happens between forward and backward; threads, and other ways to run a model."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from inlay import (
    LoraConfig,
    PeftWarning,
    get_peft_model,
)
from shira_models import IDS, TARGETS, adapted, disturb, gradients, layers, net, same, shira
from small_net import Net

# ---------------------------------------------------------------------- autograd: never a wrong gradient


def test_a_reference_pass_between_forward_and_backward() -> None:
    """The pattern of DPO; also with the switches that hold for the whole model, and a reference adapter."""
    wanted = adapted("a", "b")
    (wanted(IDS) - net()(IDS).detach()).square().sum().backward()

    model = adapted("a", "b")
    y = model(IDS)
    with model.disable_adapter():
        (y - model(IDS)).square().sum().backward()
    assert same(gradients(model), gradients(wanted))

    model = adapted("a", "b")
    y = model(IDS)
    model.disable_adapter_layers()
    with torch.no_grad():
        reference = model(IDS)
    model.enable_adapter_layers()
    (y - reference).square().sum().backward()
    assert same(gradients(model), gradients(wanted))

    model, wanted = adapted("a", "b"), adapted("a", "b")
    wanted.set_adapter("b")
    reference = wanted(IDS).detach()
    wanted.set_adapter("a")
    (wanted(IDS) - reference).square().sum().backward()
    y = model(IDS)
    model.set_adapter("b", inference_mode=True)
    with torch.no_grad():
        reference = model(IDS)
    model.set_adapter("a")
    (y - reference).square().sum().backward()
    assert same(gradients(model), gradients(wanted))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_backward_after_the_values_have_changed_is_an_error(kind: str) -> None:
    base = nn.Sequential(nn.Linear(6, 6)) if kind == "linear" else nn.Sequential(nn.Conv1d(6, 6, 1))
    model = get_peft_model(base, shira(target_modules=["0"]))
    x = torch.randn(2, 6, 6, requires_grad=True)
    y = model(x)
    disturb(model)
    model(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_after_the_adapter_is_gone_does_not_bring_it_back() -> None:
    base = nn.Sequential(nn.Linear(6, 6))
    before = base[0].weight.detach().clone()
    model = get_peft_model(base, shira(target_modules=["0"]))
    disturb(model)
    y = model(torch.randn(2, 6, requires_grad=True))
    bare = model.unload()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert torch.equal(bare[0].weight, before)


def test_two_passes_before_one_backward() -> None:
    model, wanted = adapted(), adapted()
    (model(IDS) * model(IDS.flip(0))).sum().backward()
    (wanted(IDS) * wanted(IDS.flip(0))).sum().backward()
    assert same(gradients(model), gradients(wanted))


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    class Checkpointed(Net):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for block in self.blocks:
                x = checkpoint(
                    lambda x, b=block: x + b["v_proj"](torch.tanh(b["q_proj"](x))), x, use_reentrant=False
                )
            y: Tensor = self.head(x)
            return y

    torch.manual_seed(0)
    model, wanted = get_peft_model(Checkpointed(), shira()), adapted()
    disturb(model)
    model(IDS).square().sum().backward()
    wanted(IDS).square().sum().backward()
    assert same(gradients(model), gradients(wanted))


def test_a_base_that_was_written_to_under_the_values_is_an_error() -> None:
    model = adapted()
    model(IDS)
    with torch.no_grad():
        layers(model)[0].get_base_layer().weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place while the values of adapters"):
        model.unload()


def test_a_base_that_was_written_back_unchanged_is_not() -> None:
    model = adapted()
    y = model(IDS)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.clone())  # as DistributedDataParallel does
    assert torch.equal(model(IDS), y)
    assert torch.equal(model.unload()(IDS), net()(IDS))


# ---------------------------------------------------------------------- threads, sharing, and other ways to run a model


def test_threads_with_settings_of_their_own_do_not_disturb_each_other() -> None:
    model = adapted("a", "b", width=32)
    wanted = {"a": model(IDS), None: net(32)(IDS)}
    model.set_adapter("b")
    wanted["b"] = model(IDS)
    model.set_adapter("a")
    wrong: list[Any] = []

    def serve(name: str | None) -> None:
        for _ in range(60):
            with torch.no_grad():
                if name is None:
                    with model.disable_adapter():
                        y = model(IDS)
                elif name == "b":
                    y = model(IDS, adapter_names=["b", "b"])
                else:
                    y = model(IDS)
            if not torch.allclose(y, wanted[name], atol=1e-5):
                wrong.append(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in ("a", "b", None, "a")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_one_thread_asks_for_is_never_what_another_is_about_to_replace() -> None:
    """The weight holds b when the model's setting is a already: who asks for b alone must not compute with that weight."""
    model = adapted("a", "b", width=32)
    wanted = {"a": model(IDS)}
    model.set_adapter("b")
    wanted["b"] = model(IDS)
    model.set_adapter("a")
    weight = next(model.base_model.layers()).weight
    with torch.no_grad():
        assert torch.allclose(model(IDS, adapter_names=["b", "b"]), wanted["b"], atol=1e-5)
        standing = weight.clone()
        assert torch.allclose(model(IDS), wanted["a"], atol=1e-5)
    assert torch.equal(weight, standing)


def test_a_weight_that_two_modules_share_is_never_written_to() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 10, bias=False)
            self.head.weight = self.embed.weight

    torch.manual_seed(0)
    base = Tied()
    before = base.embed.weight.detach().clone()
    with pytest.warns(PeftWarning, match="no longer tied"):
        model = get_peft_model(base, shira(target_modules=["embed"]))
    disturb(model)
    y = model(IDS)
    assert torch.equal(base.head.weight, before)
    model.merge_adapter()
    assert torch.allclose(model(IDS), y, atol=1e-6)


def test_beside_lora_and_in_mixed_batches() -> None:
    model = adapted("a")
    model.add_adapter("lora", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    model.eval()
    base, with_a = net()(IDS), model(IDS)
    model.set_adapter("lora")
    with_lora = model(IDS)
    mixed = model(IDS, adapter_names=["a", "__base__"])
    assert torch.allclose(mixed[0], with_a[0], atol=1e-6) and torch.allclose(mixed[1], base[1], atol=1e-6)
    assert torch.equal(model(IDS), with_lora)
    model.set_adapter(["a", "lora"])
    both = model(IDS)
    assert all(layer.inside.entered for layer in layers(model))
    model.merge_adapter()
    assert torch.allclose(model(IDS), both, atol=1e-5)


def test_functional_call_with_the_parameters_of_a_running_model() -> None:
    """``named_parameters`` shows the weight as it stands; run with it, the values must not count twice."""
    model = adapted()
    y = model(IDS)
    tensors = {k: v.detach() for k, v in model.named_parameters()}
    assert torch.allclose(torch.func.functional_call(model, tensors, (IDS,)), y, atol=1e-6)
    assert torch.equal(model(IDS), y)


def test_inference_mode_and_compiled_models_see_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("a", "b")
    wanted = adapted("a", "b")(IDS)
    with torch.inference_mode():
        assert torch.equal(model(IDS), wanted)
    assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(IDS), wanted, atol=1e-6)
    model(IDS).sum().backward()


def test_hooks_of_the_base_layer_run() -> None:
    model, calls = adapted(), []
    layers(model)[0].get_base_layer().register_forward_hook(lambda module, args, output: calls.append(1))
    model(IDS).sum().backward()
    with torch.no_grad():
        model(IDS)
    assert len(calls) == 2
