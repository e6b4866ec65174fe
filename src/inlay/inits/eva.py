"""EVA: A starts as the leading components of what its layer sees. Paischer et al. 2024, https://arxiv.org/abs/2410.07170

    A = V_r      V_r[r, in]: the r leading principal components of the layer's inputs x[..., in] over a user's data      B = 0

Ranks are redistributed: of the components of all layers, those that explain most of their layer's variance are taken, as
many as the configuration has in all and at most rho * r in one layer. B is zero: the adapted layer starts as the layer.
Authors' code: https://github.com/ml-jku/EVA
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import PeftWarning
from . import EvaConfig, initialisation
from .eva_run import EvaRun

if TYPE_CHECKING:
    from ..layer import AdaptedLayer
    from ..method import Slot
    from ..methods.lora import LoraConfig
    from ..peft_model import PeftModel

PREFIX = "base_model.model."

LayerInputs = Callable[[Any, Any, str], Tensor]


@initialisation("eva")
def eva(slot: Slot) -> None:
    """Start as with True; ``initialize_lora_eva_weights`` sets A once there is data."""


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run a model on a dictionary of inputs."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Any], peft_config: LoraConfig) -> Tensor:
    """Return the positions [n, 2] of a batch of token ids that count: not padding, and not masked in the labels."""
    if not isinstance(model_input, Mapping):
        raise TypeError(f"the inputs are a {type(model_input).__name__}, not a dictionary; pass prepare_model_inputs_fn=None or your own")
    eva_config = peft_config.eva_config or EvaConfig()
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    if eva_config.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != eva_config.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """Return the rows [n, in] of a layer's input at the positions that ``prepare_model_inputs_fn_language_modeling`` chose."""
    x = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    if x.dim() != model_input.shape[1] + 1:
        raise ValueError(
            f"layer {layer_name} sees inputs of shape {tuple(x.shape)}, not [batch, position, in]; leave it out with exclude_modules, or "
            "pass a prepare_layer_inputs_fn of your own (None takes all rows)"
        )
    rows: Tensor = x[model_input.T.unbind()]
    return rows


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs | Mapping[str, LayerInputs] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Return EVA's components for every linear layer that an adapter sits on, ``{module path: A[rank, in]}``.

    The batches are run again and again until the components no longer turn.

    Args:
        model: a ``PeftModel``, or a bare model.
        dataloader: batches; it must be possible to go through it more than once.
        peft_config: what to adapt in a bare model.
        forward_fn: how to run the model on a batch; by default as ``model(**batch)``.
        prepare_model_inputs_fn: makes of a batch and ``peft_config`` what ``prepare_layer_inputs_fn`` is given; by default the
            positions of a batch of texts that are not masked.
        prepare_layer_inputs_fn: makes of a layer's inputs, the above and the layer's path the rows [n, in] that count; one
            function, or one by path. None takes all.
        adapter_name: which adapter of a ``PeftModel``.
        gather_distributed_inputs: put the rows of all processes together.
        show_progress_bar: show how many layers are done.

    Raises:
        ValueError: there is nothing to look at: no configuration, no layers, no batches or no rows in them.
    """
    from ..peft_model import PeftModel

    adapted = isinstance(model, PeftModel)
    if peft_config is None and not adapted:
        raise ValueError("peft_config is required if model is not a PeftModel")
    config: Any = peft_config or model.peft_config[adapter_name]  # type: ignore[operator, index]
    layers, ranks = _adapted(model, adapter_name) if isinstance(model, PeftModel) else _targeted(model, config)
    run = EvaRun(
        layers, ranks, config, lambda batch: forward_fn(model, batch), prepare_model_inputs_fn, prepare_layer_inputs_fn,
        gather_distributed_inputs,
    )  # fmt: skip
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
            return run.components(dataloader, show_progress_bar)
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs | Mapping[str, LayerInputs] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Set a LoRA adapter's A from data and redistribute its ranks; layers that get none lose their adapter.

    Call it before the optimiser is made: layers whose rank changes have new parameters.

    Args:
        model: a ``PeftModel`` whose adapter has ``init_lora_weights="eva"``, on the meta device or not.
        dataloader: see ``get_eva_state_dict``, as are the arguments not named here.
        eva_state_dict: what ``get_eva_state_dict`` returned, in place of a dataloader.

    Raises:
        ValueError: the model has no such adapter or several active ones, neither data nor components are given, or the
            components are not for this adapter. The model is then unchanged.
    """
    config = _eva_config_of(model, adapter_name)
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, config, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar,
        )  # fmt: skip
    layers, _ = _adapted(model, adapter_name)
    found = {path if path in layers else PREFIX + path: components for path, components in eva_state_dict.items()}
    for path, components in found.items():
        if path not in layers or components.dim() != 2 or components.shape[1] != layers[path].kind.in_features:
            raise ValueError(f"eva_state_dict does not fit adapter {adapter_name!r}: components {list(components.shape)} for {path}")
    slots = {path.replace(".base_layer", ""): w.slots[adapter_name] for path, w in _with_adapter(model, adapter_name)}
    if left := sorted(path for path in slots if PREFIX + path not in found):
        warnings.warn(f"EVA has no components for {left}, which start as with init_lora_weights=True", PeftWarning, stacklevel=2)
    _set_ranks(model, adapter_name, config, slots, {path: len(found[PREFIX + path]) for path in slots if PREFIX + path in found})
    for path, layer in _adapted(model, adapter_name)[0].items():
        if path in found:
            layer.slots[adapter_name]["lora_A"].weight.copy_(found[path])


def _set_ranks(model: PeftModel, name: str, config: LoraConfig, slots: Mapping[str, Slot], ranks: Mapping[str, int]) -> None:
    """Give each layer its new rank, by setting the adapter in anew where that changes anything."""
    now = {path: ranks.get(path, slot["r"]) for path, slot in slots.items()}
    if all(slot["r"] == now[path] and not _on_meta(slot) for path, slot in slots.items()):
        return
    if config.layer_replication:
        raise ValueError("EVA cannot redistribute ranks in a model with layer_replication; set eva_config=EvaConfig(rho=1.0)")
    rank_pattern, alpha_pattern = _patterns(config, slots, now)
    changes: dict[str, Any] = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    if dropped := {path for path, rank in now.items() if not rank}:
        changes["target_modules"] = {path for path in slots if path not in dropped}
    parameters = [p for slot in slots.values() for p in slot.parameters().values()]
    active = model.active_adapters
    model.base_model.delete_adapter(name)
    model.base_model.add_adapter(name, replace(config, **changes), autocast_adapter_dtype=parameters[0].dtype == torch.float32)
    model.base_model.set_adapter(active, inference_mode=config.inference_mode)


def _on_meta(slot: Slot) -> bool:
    return any(p.device.type == "meta" for p in slot.parameters().values())


def _patterns(config: LoraConfig, slots: Mapping[str, Slot], now: Mapping[str, int]) -> tuple[dict[str, int], dict[str, float]]:
    """Return ``rank_pattern`` and ``alpha_pattern`` for new ranks. A key is a whole path, but also matches paths that end in it."""
    from ..methods.lora import by_pattern

    adjust = (config.eva_config or EvaConfig()).adjust_scaling_factors
    ranks: dict[str, int] = {}
    alphas: dict[str, Any] = {}
    for path in sorted((path for path in slots if now[path]), key=len):
        growth = now[path] / slots[path]["r"] if adjust else 1.0
        alpha = slots[path]["lora_alpha"] * (growth**0.5 if config.use_rslora else growth)
        if by_pattern(ranks, path, config.r) != now[path]:
            ranks = {path: now[path], **ranks}
        if by_pattern(alphas, path, config.lora_alpha) != alpha:
            alphas = {path: int(alpha) if alpha == int(alpha) else alpha, **alphas}
    return ranks, alphas


def _eva_config_of(model: Any, name: str) -> Any:
    from ..peft_model import PeftModel

    if not isinstance(model, PeftModel):
        raise ValueError(f"model must be a PeftModel, not a {type(model).__name__}; wrap it with get_peft_model")
    if name not in model.peft_config:
        raise ValueError(f"Adapter {name} not found. There are: {sorted(model.peft_config)}")
    if len(model.active_adapters) > 1:
        raise ValueError(f"`initialize_lora_eva_weights` works with a single active adapter; active are {model.active_adapters}")
    config: Any = model.peft_config[name]
    if (how := getattr(config, "init_lora_weights", None)) != "eva":
        raise ValueError(f"`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`; adapter {name!r} has {how!r}")
    return config


def _with_adapter(model: PeftModel, name: str) -> list[tuple[str, AdaptedLayer]]:
    from ..walk import adapted_layers

    return [(path, layer) for path, layer in adapted_layers(model.get_base_model()) if name in layer.slots]


def _adapted(model: PeftModel, name: str) -> tuple[dict[str, AdaptedLayer], dict[str, int]]:
    """Return the linear layers under an adapter, by their paths in the model, and their ranks. Layers that are read and never
    called are left out."""
    from ..kinds import Linear

    layers = {PREFIX + path: w for path, w in _with_adapter(model, name) if isinstance(w.kind, Linear) and not w.read_through}
    return layers, {path: layer.slots[name]["r"] for path, layer in layers.items()}


def _targeted(model: nn.Module, config: Any) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """Return the linear layers of a bare model that a configuration names, and their ranks."""
    from ..injection import resolve
    from ..kinds import Linear, kind_of
    from ..methods.lora import by_pattern
    from ..targets import find_targets

    named = dict(model.named_modules())
    layers = {path: named[path] for path in find_targets(named, resolve(model, config)) if isinstance(kind_of(named[path]), Linear)}
    return layers, {path: by_pattern(config.rank_pattern, path, config.r) for path in layers}
