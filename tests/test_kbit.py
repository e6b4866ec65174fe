"""``prepare_model_for_kbit_training``, on models that only say that they are quantised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import inlay
from tiny_models import tiny, tiny_inputs

Prepare = Callable[..., Any]


class Params4bit(nn.Parameter):
    """Bears the name by which bitsandbytes' packed weights are told from others."""


def model(**marks: Any) -> Any:
    built = tiny("llama", torch.bfloat16).train()
    for name, value in marks.items():
        setattr(built, name, value)
    return built


def state(prepared: nn.Module) -> dict[str, tuple[torch.dtype, bool]]:
    return {name: (p.dtype, p.requires_grad) for name, p in prepared.named_parameters()}


def checkpointing(prepared: Any) -> bool:
    """Whether layers recompute their activations. Asked at the modules, since the model's own property changed its name."""
    return any(getattr(m, "gradient_checkpointing", False) for m in prepared.modules())


@pytest.mark.parametrize(
    "marks",
    [
        {},
        {"is_quantized": True, "is_loaded_in_4bit": True},
        {"is_quantized": True, "is_loaded_in_8bit": True},
        *(
            {"is_quantized": True, "quantization_method": m}
            for m in ("gptq", "aqlm", "eetq", "hqq", "torchao")
        ),
    ],
)
@pytest.mark.parametrize("arguments", [{}, {"use_gradient_checkpointing": False}])
@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing_enable. is deprecated:FutureWarning"
)  # PEFT's call
def test_does_what_peft_does(marks: dict[str, Any], arguments: dict[str, Any]) -> None:
    ours, theirs = model(**marks), model(**marks)
    assert inlay.prepare_model_for_kbit_training(ours, **arguments) is ours
    peft.prepare_model_for_kbit_training(theirs, **arguments)
    assert state(ours) == state(theirs)
    assert checkpointing(ours) == checkpointing(theirs)
    assert hasattr(ours, "_require_grads_hook") == hasattr(theirs, "_require_grads_hook")


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_adapters_get_the_gradients_they_get_without_checkpointing(reentrant: bool | None) -> None:
    kwargs = None if reentrant is None else {"use_reentrant": reentrant}
    gradients: list[list[Tensor | None]] = []
    for arguments in ({"use_gradient_checkpointing": False}, {"gradient_checkpointing_kwargs": kwargs}):
        base = model(is_quantized=True, is_loaded_in_4bit=True)
        inlay.prepare_model_for_kbit_training(base, **arguments)
        assert checkpointing(base) == ("gradient_checkpointing_kwargs" in arguments)
        torch.manual_seed(0)
        adapted = inlay.get_peft_model(base, inlay.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
        inputs = tiny_inputs("llama")
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([p.grad for p in adapted.parameters() if p.requires_grad])
    assert len(gradients[0]) > 0
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        assert recomputed is not None
        assert torch.equal(plain, recomputed)


def test_packed_weights_stay_as_they_are() -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).to(torch.float16)
    packed = layers[0].weight = Params4bit(layers[0].weight.detach())
    layers.is_loaded_in_4bit = True  # type: ignore[assignment]
    inlay.prepare_model_for_kbit_training(layers, use_gradient_checkpointing=False)
    assert layers[0].weight is packed
    assert packed.dtype == torch.float16
    assert [p.dtype for p in layers[1].parameters()] == [torch.float32] * 2
    assert not any(p.requires_grad for p in layers.parameters())


def test_any_module_can_be_prepared() -> None:
    layers = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16)
    assert inlay.prepare_model_for_kbit_training(layers)[0].weight.dtype == torch.float32
