"""EVA: A starts as the leading components of what its layer sees.

Paischer et al. 2024, https://arxiv.org/abs/2410.07170

    A = V_r      V_r[r, in]: the r leading principal components of the layer's inputs x[..., in]      B = 0

Ranks are redistributed: of the components of all layers, those that explain most of their layer's variance
are taken, as many as the configuration has in all and at most rho * r in one layer. B is zero: the adapted
layer starts as the layer itself.
Authors' code: https://github.com/ml-jku/EVA
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import PeftWarning
from . import initialisation
from .eva_inputs import (
    LayerInputs,
    forward_fn_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from .eva_ranks import set_ranks
from .eva_run import EvaRun

if TYPE_CHECKING:
    from ..layers.layer import AdaptedLayer
    from ..method import Slot
    from ..methods.lora import LoraConfig
    from ..peft_model import PeftModel

PREFIX = "base_model.model."


@initialisation("eva")
def eva(slot: Slot) -> None:
    """Start as with True; ``initialize_lora_eva_weights`` sets A once there is data."""


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs
    | Mapping[str, LayerInputs]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Return EVA's components for every linear layer that an adapter sits on, ``{path: A[rank, in]}``.

    The batches are run again and again until the components no longer turn.

    Args:
        model: a ``PeftModel``, or a bare model.
        dataloader: batches; it must be possible to go through it more than once.
        peft_config: what to adapt in a bare model.
        forward_fn: how to run the model on a batch; by default as ``model(**batch)``.
        prepare_model_inputs_fn: makes of a batch and ``peft_config`` what ``prepare_layer_inputs_fn`` is
            given; by default the positions of a batch of texts that are not masked. None gives the batch.
        prepare_layer_inputs_fn: makes of a layer's inputs, the above and the layer's path the rows [n, in]
            that count; one function, or one by path. None takes all.
        adapter_name: which adapter of a ``PeftModel``.
        gather_distributed_inputs: put the rows of all processes together.
        show_progress_bar: show how many layers are done.

    Raises:
        ValueError: there is nothing to look at: no configuration, no layers, no batches or no rows in them.
    """
    from ..peft_model import PeftModel

    own = model if isinstance(model, PeftModel) else None
    config: Any = own.peft_config[adapter_name] if own is not None and peft_config is None else peft_config
    if config is None:
        raise ValueError("peft_config is required if model is not a PeftModel")
    layers, ranks = _targeted(model, config) if own is None else _adapted(own, adapter_name)
    prepare = (prepare_model_inputs_fn, prepare_layer_inputs_fn, gather_distributed_inputs)
    run = EvaRun(layers, ranks, config, lambda batch: forward_fn(model, batch), *prepare)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with nullcontext() if own is None else own.disable_adapter():
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
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs
    | Mapping[str, LayerInputs]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Set a LoRA adapter's A from data and redistribute its ranks; layers that get none lose their adapter.

    Call it before the optimiser is made: layers whose rank changes have new parameters.

    Args:
        model: a ``PeftModel`` whose adapter has ``init_lora_weights="eva"``, on the meta device or not.
        dataloader: see ``get_eva_state_dict``, as for all arguments that follow ``eva_state_dict``.
        eva_state_dict: what ``get_eva_state_dict`` returned, in place of a dataloader.
        forward_fn: how to run the model on a batch.
        prepare_model_inputs_fn: what to tell ``prepare_layer_inputs_fn`` of a batch.
        prepare_layer_inputs_fn: which rows of a layer's inputs count.
        adapter_name: which adapter.
        gather_distributed_inputs: put the rows of all processes together.
        show_progress_bar: show how many layers are done.

    Raises:
        ValueError: the model has no such adapter or several active ones, neither data nor components are
            given, or the components are not for this adapter. The model is then unchanged.
    """
    _check_eva(model, adapter_name)
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            forward_fn=forward_fn,
            prepare_model_inputs_fn=prepare_model_inputs_fn,
            prepare_layer_inputs_fn=prepare_layer_inputs_fn,
            adapter_name=adapter_name,
            gather_distributed_inputs=gather_distributed_inputs,
            show_progress_bar=show_progress_bar,
        )
    found = {path.removeprefix(PREFIX): components for path, components in eva_state_dict.items()}
    layers, _ = _adapted(model, adapter_name)
    for path, a in found.items():
        layer = layers.get(PREFIX + path)
        if layer is None or a.dim() != 2 or a.shape[1] != layer.kind.in_features:
            raise ValueError(
                f"eva_state_dict does not fit adapter {adapter_name!r}: components {list(a.shape)} for {path}"
            )
    slots = {path: layer.slots[adapter_name] for path, layer in _with_adapter(model, adapter_name).items()}
    if left := sorted(slots.keys() - found.keys()):
        warnings.warn(
            f"EVA has no components for {left}, which start as with init_lora_weights=True",
            PeftWarning,
            stacklevel=2,
        )
    set_ranks(model, adapter_name, slots, {path: len(a) for path, a in found.items()})
    for path, layer in _with_adapter(model, adapter_name).items():
        if path in found:
            layer.slots[adapter_name]["lora_A"].weight.copy_(found[path])


def _check_eva(model: Any, name: str) -> None:
    from ..peft_model import PeftModel

    if not isinstance(model, PeftModel):
        raise ValueError(f"model must be a PeftModel, not a {type(model).__name__}; use get_peft_model")
    if name not in model.peft_config:
        raise ValueError(f"Adapter {name} not found. There are: {sorted(model.peft_config)}")
    if len(active := model.active_adapters) > 1:
        raise ValueError(f"`initialize_lora_eva_weights` needs a single active adapter; active are {active}")
    if (how := getattr(model.peft_config[name], "init_lora_weights", None)) != "eva":
        raise ValueError(
            "`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`; "
            f"adapter {name!r} has {how!r}"
        )


def _with_adapter(model: PeftModel, name: str) -> dict[str, AdaptedLayer]:
    """Return the layers that hold an adapter's factors, by their paths in the base model."""
    from ..injection.walk import adapted_layers

    found = [(path, layer) for path, layer in adapted_layers(model.get_base_model()) if name in layer.slots]
    return {path.replace(".base_layer", ""): w for path, w in found if w.slots[name].owner is None}


def _adapted(model: PeftModel, name: str) -> tuple[dict[str, AdaptedLayer], dict[str, int]]:
    """Return the linear layers under an adapter by their paths in the ``PeftModel``, and their ranks.

    Layers that are read and never called are left out.
    """
    from ..kinds import Linear

    below = {PREFIX + path: layer for path, layer in _with_adapter(model, name).items()}
    layers = {path: w for path, w in below.items() if isinstance(w.kind, Linear) and not w.read_through}
    return layers, {path: layer.slots[name]["r"] for path, layer in layers.items()}


def _targeted(model: nn.Module, config: Any) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """Return the linear layers of a bare model that a configuration names, and their ranks."""
    from ..injection.inject import resolve
    from ..injection.targets import find_targets
    from ..kinds import Linear, kind_of
    from ..methods.lora import by_pattern

    named = dict(model.named_modules())
    paths = find_targets(named, resolve(model, config))
    layers = {path: named[path] for path in paths if isinstance(kind_of(named[path]), Linear)}
    return layers, {path: by_pattern(config.rank_pattern, path, config.r) for path in layers}
