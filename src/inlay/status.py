"""What is adapted, on and trained: a report per layer and one for the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .adapted_model import AdaptedModel
from .injection.walk import wrappers
from .layers.extras import ModulesToSaveWrapper
from .layers.layer import AdaptedLayer
from .switch import Setting

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """State of one adapted layer; fields as in PEFT."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """State of a model; a field is "irregular" where its layers differ. Fields as in PEFT."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the state of each adapted layer of a ``PeftModel`` or of a model with injected adapters.

    Raises:
        ValueError: the model has no adapters.
    """
    bare, prefix = _bare(model)
    found: list[TunerLayerStatus] = []
    for path, wrapper in wrappers(bare):
        if isinstance(wrapper, AdaptedLayer):
            found.append(_layer_status(f"{prefix}{path}", wrapper))
        elif isinstance(wrapper, ModulesToSaveWrapper):
            found.append(_saved_status(f"{prefix}{path}", wrapper))
    base = getattr(model, "base_model", None)
    if isinstance(base, AdaptedModel) and len(base.prompts.encoders):
        encoders = {name: list(e.parameters()) for name, e in base.prompts.encoders.items()}
        found.append(_status("prompt_encoder", "PromptModule", base.switch.now(), [], encoders))
    if not found:
        raise ValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have adapters injected."
        )
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Return the state of a ``PeftModel`` or of a model with injected adapters.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = get_layer_status(model)
    bare, prefix = _bare(model)
    configs = getattr(model, "peft_config", {})
    names = sorted({name for layer in layers for name in layer.available_adapters})
    return TunerModelStatus(
        base_model_type=type(bare).__name__,
        adapter_model_type=type(model.base_model).__name__ if prefix else "None",
        peft_types={name: getattr(c.peft_type, "value", str(c.peft_type)) for name, c in configs.items()},
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_params=sum(p.numel() for p in model.parameters()),
        num_adapter_layers=len(layers),
        enabled=_common([layer.enabled for layer in layers]),
        active_adapters=_common([layer.active_adapters for layer in layers]),
        merged_adapters=_common([layer.merged_adapters for layer in layers]),
        requires_grad={
            n: _common([v for layer in layers if (v := layer.requires_grad.get(n)) is not None])
            for n in names
        },
        available_adapters=names,
        devices={n: sorted({d for layer in layers for d in layer.devices.get(n, ())}) for n in names},
    )


def _bare(model: nn.Module) -> tuple[nn.Module, str]:
    base = getattr(model, "base_model", None)
    return (base.model, "model.") if isinstance(base, AdaptedModel) else (model, "")


def _layer_status(path: str, layer: AdaptedLayer) -> TunerLayerStatus:
    parameters = {name: list(slot.parameters().values()) for name, slot in layer.slots.items()}
    kind = f"adapted.{type(layer.get_base_layer()).__name__}"
    return _status(path, kind, layer.setting(), layer.merged_adapters, parameters)


def _saved_status(path: str, wrapper: ModulesToSaveWrapper) -> TunerLayerStatus:
    parameters = {name: list(module.parameters()) for name, module in wrapper.modules_to_save.items()}
    return _status(path, type(wrapper).__name__, wrapper.switch.now(), [], parameters)


def _status(
    path: str, kind: str, setting: Setting, merged: list[str], parameters: dict[str, list[nn.Parameter]]
) -> TunerLayerStatus:
    return TunerLayerStatus(
        name=path,
        module_type=kind,
        enabled=setting.enabled,
        active_adapters=list(setting.active),
        merged_adapters=list(merged),
        requires_grad={name: _common([p.requires_grad for p in ps]) for name, ps in parameters.items()},
        available_adapters=sorted(parameters),
        devices={name: sorted({p.device.type for p in ps}) for name, ps in parameters.items()},
    )


def _common(values: list[Any]) -> Any:
    return values[0] if values and all(v == values[0] for v in values) else "irregular"
