"""Setting an adapter into a model: decide everything first, then change the model, and undo it all if a method refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from ..config import PeftConfig
from ..errors import NoMatchingPeftModuleError
from ..kinds import LayerKind, Linear, Output, kind_of, supported_layers
from ..layers.extras import ModulesToSaveWrapper, TrainableTokensWrapper, find_saved
from ..layers.in_weight import mark_shared
from ..layers.inverse import InverseTap
from ..layers.layer import AdaptedLayer
from ..layers.output import AdaptedOutput
from ..layers.taps import taps_on
from ..layers.torch_fast_paths import keep_modules_called, restore_fast_paths
from ..method import Method, Slot, method_by_name
from ..methods.trainable_tokens import TrainableTokens, TrainableTokensConfig
from ..switch import Switch
from .targets import (
    ALL_LINEAR,
    embedding_ends,
    find_targets,
    matches,
    output_layers,
    warn_of_unused_names,
    warn_of_unused_patterns,
)
from .tied import Groups, check_tying, shared_weights, tie_copies, tied_places, with_tied
from .walk import Place, Site, adapted_layers, places, places_to_adapt, unwrapped, wrappers


@dataclass
class Plan:
    """What an adapter needs: parameters to adapt, sites that its method chose, modules to save whole, token rows to train."""

    method: Method
    layers: list[tuple[Place, str]]
    sites: list[Site]
    saved: list[Place]
    tokens: list[tuple[Place, list[int]]]
    tied: Groups


def resolve(model: nn.Module, config: PeftConfig) -> Any:
    """Return a copy of a configuration with default targets and "all-linear" spelled out for this model."""
    settled: Any = replace(config)
    method_by_name(config.method_name())().complete(settled, model)
    if getattr(settled, "target_modules", None) == ALL_LINEAR:
        settled.target_modules = set(_linear_paths(model, places_to_adapt(model, settled), settled.task_type))
    return settled


def _linear_paths(model: nn.Module, known: dict[str, Place], task_type: Any) -> Iterable[str]:
    """Yield the paths of all linear layers but the output layer."""
    heads = [unwrapped(head)[0] for head in output_layers(model, task_type)]
    for path, place in known.items():
        if isinstance(kind_of(place.module), Linear) and all(place.module is not head for head in heads):
            yield path


def plan(model: nn.Module, config: Any) -> Plan:
    """Decide where an adapter goes, without changing anything.

    Raises:
        NoMatchingPeftModuleError: nothing is named by the configuration.
        ValueError: a named module is of a kind that no adapter can sit on.
    """
    known = places(model)
    tied = shared_weights(known.values())
    saved = [known[path] for path in find_saved(known, getattr(config, "modules_to_save", None) or ())]
    if getattr(config, "ensure_weight_tying", False):
        saved = with_tied(saved, tied)
    tokens = _token_places(model, config, known)
    inside_saved = [
        place
        for place in known.values()
        if any(s in place.inside or s is place.module for s in (p.module for p in saved))
    ]
    blocked = {place.path for place in inside_saved}
    method = cast("Method", method_by_name(config.method_name())())
    sites = method.sites(config, model, known)
    if sites is not None:
        _check_saved(sites, saved)
        sites = [site for site in sites if site.place.path not in blocked]
    paths = (
        find_targets((path for path in known if path not in blocked), config)
        if config.target_modules and sites is None
        else []
    )
    layers = [(known[path], "weight") for path in paths]
    layers += [
        item
        for item in _parameter_places(known, getattr(config, "target_parameters", None) or ())
        if item not in layers
    ]
    if not layers and not sites:
        raise NoMatchingPeftModuleError(
            f"Nothing was targeted for adaptation: target_modules={config.target_modules or None}, "
            f"target_parameters={getattr(config, 'target_parameters', None)}; name modules or parameters of the model."
        )
    for place, param in layers:
        if kind_of(place.module, param) is None:
            raise ValueError(
                f"Target module {place.path} ({type(place.module).__name__}) is not supported. "
                f"Adapters can sit on: {supported_layers()}."
            )
        if place in [p for p, _ in tokens]:
            raise ValueError(
                f"trainable_token_indices names {place.path}, which the adapter already targets; choose one of the two"
            )
    if len({p.module for p in saved} & {p.module for p, _ in tokens}):
        raise ValueError(
            "trainable_token_indices and modules_to_save name the same embedding; choose one of the two"
        )
    warn_of_unused_names(known, config)
    warn_of_unused_patterns([_parameter_path(place, param) for place, param in layers], config)
    if not getattr(config, "layer_replication", None):  # which shares weights on purpose
        check_tying(config, [] if method.follows_tying(config) else [p for p, _ in layers], saved, tied)
    return Plan(method, _with_out_projections(known, layers), sites or [], saved, tokens, tied)


def _check_saved(sites: Sequence[Site], saved: Sequence[Place]) -> None:
    for site in sites:
        if any(site.place is place for place in saved):
            raise ValueError(
                f"modules_to_save names {site.place.path}, on whose output the adapter is to act; choose one of the two"
            )


def _parameter_places(known: dict[str, Place], names: Iterable[str]) -> Iterable[tuple[Place, str]]:
    names = list(names)
    for path, place in known.items():
        for param, value in place.module._parameters.items():
            if value is not None and matches(f"{path}.{param}", names):
                yield place, param


def _parameter_path(place: Place, param: str) -> str:
    """Return the name by which ``rank_pattern`` knows a target: the module's path, or that of another parameter."""
    return place.path if param == "weight" else f"{place.path}.{param}"


def _with_out_projections(
    known: dict[str, Place], layers: list[tuple[Place, str]]
) -> list[tuple[Place, str]]:
    """Adapt the output projection of every attention module that is targeted as a whole, as PEFT does."""
    extended = list(layers)
    for place, param in layers:
        if param == "weight" and isinstance(place.module, nn.MultiheadAttention):
            inner = known[f"{place.path}.out_proj"]
            if all(inner is not other for other, _ in layers):
                extended.append((inner, "weight"))
    return extended


def _token_places(model: nn.Module, config: Any, known: dict[str, Place]) -> list[tuple[Place, list[int]]]:
    wanted = getattr(config, "trainable_token_indices", None)
    if not wanted:
        return []
    if not isinstance(wanted, dict):
        embedding, _ = embedding_ends(model)
        if embedding is None:
            raise ValueError(
                "the model has no input embedding; name one: trainable_token_indices={name: rows}"
            )
        bare, _ = unwrapped(embedding)
        wanted = {next(path for path, place in known.items() if place.module is bare): list(wanted)}
    found = []
    for name, rows in wanted.items():
        hits = [place for path, place in known.items() if matches(path, [name])]
        if not hits:
            raise ValueError(
                f"Target modules {{{name!r}}} not found in the base model: trainable_token_indices names no module of it."
            )
        found += [(place, list(rows)) for place in hits]
    return found


def inject(
    model: nn.Module,
    config: Any,
    name: str,
    switch: Switch,
    *,
    initialise: bool = True,
    full_precision: bool = True,
) -> list[Slot]:
    """Set an adapter into a model, in place. If anything fails, the model is as it was.

    Args:
        model: the base model, which may already carry adapters.
        config: a resolved configuration.
        name: the adapter's name.
        switch: the model's switch.
        initialise: False leaves the new parameters on the meta device, for values that are about to be loaded.
        full_precision: keep the new parameters in float32 where the base is in half precision.

    Returns:
        The adapter's slots, in the order of the model's modules.
    """
    chosen = plan(model, config)
    slots: list[Slot] = []
    initialise = initialise or chosen.method.changes_base(config)
    try:
        for place, param in chosen.layers:
            path = _parameter_path(place, param)
            slots.append(_wrap(place, param, switch).add(name, chosen.method, config, path))
            if chosen.method.follows_tying(config):
                slots += _twins(
                    tied_places(place, chosen.tied), slots[-1], lambda twin: _wrap(twin, "weight", switch)
                )
        for place, kind in chosen.sites:
            layer = _wrapped_as(place, kind, switch)
            slots.append(layer.add(name, chosen.method, config, place.path))
        for place, rows in chosen.tokens:
            slots += _add_token_rows(place, tied_places(place, chosen.tied), rows, name, switch)
        for place in chosen.saved:
            _save_whole(place, name, switch)
        if getattr(config, "ensure_weight_tying", False):
            tie_copies(chosen.saved, name)
        chosen.method.join([slot for slot in slots if slot.method is chosen.method])
        if chosen.method.in_weight:
            mark_shared(model, [slot.layer for slot in slots])
        for slot in slots:
            _settle(slot, initialise, full_precision)
    except BaseException:
        remove(model, name)
        raise
    return slots


def save_whole(model: nn.Module, config: Any, name: str, switch: Switch) -> None:
    """Give an adapter that adapts no layer its own copies of the modules it saves whole. If it fails, nothing is changed."""
    known = places(model)
    warn_of_unused_names(known, config)
    try:
        for path in find_saved(known, getattr(config, "modules_to_save", None) or ()):
            _save_whole(known[path], name, switch)
    except BaseException:
        remove(model, name)
        raise


def _settle(slot: Slot, initialise: bool, full_precision: bool) -> None:
    if slot.owner is not None:
        slot.method.become_twin(slot, slot.owner)
        return
    if initialise and slot.kind.device.type != "meta":
        slot.method.init(slot)
    elif not initialise:
        for column in slot.columns:
            if isinstance(entry := slot[column], nn.Module):
                entry.to("meta")
            elif isinstance(entry, nn.Parameter):
                slot.layer.column(column)[slot.name] = nn.Parameter(entry.to("meta"))
            elif isinstance(entry, torch.Tensor) and column in slot.method.saved_buffers:
                slot.layer.column(column)[slot.name] = entry.to("meta")
    if full_precision:
        for p in slot.parameters().values():
            if p.dtype in (torch.float16, torch.bfloat16):
                p.data = p.data.float()


def _wrap(place: Place, param: str, switch: Switch) -> AdaptedLayer:
    """Return the adapted layer of a parameter, wrapping the module if it has none."""
    kind = kind_of(place.module, param)
    assert kind is not None
    return _wrapped_as(place, kind, switch)


def _wrapped_as(place: Place, kind: LayerKind, switch: Switch) -> AdaptedLayer:
    """Return the adapted layer of a kind, wrapping the module if it has none. Adapted outputs stay outermost."""
    outer: AdaptedOutput | None = None
    layer: nn.Module = place.wrapper
    while isinstance(layer, AdaptedLayer):
        if layer.kind.param == kind.param:
            return layer
        outer, layer = layer if isinstance(layer, AdaptedOutput) else outer, layer.base_layer
    read_through = isinstance(place.inside[-1], nn.MultiheadAttention)
    if isinstance(kind, Output):
        if read_through:
            raise ValueError(
                f"{place.path} is read by its parent, never called, so it has no output to adapt; name the attention module"
            )
        new: AdaptedLayer = AdaptedOutput(place.wrapper, kind, switch)
    else:
        inner = place.wrapper if outer is None else outer.base_layer
        new = AdaptedLayer(inner, kind, switch, read_through)
    keep_modules_called(new, place.inside)
    if outer is None or isinstance(kind, Output):
        place.replace(new)
    else:
        outer.base_layer = new
    return new


def _save_whole(place: Place, name: str, switch: Switch) -> None:
    wrapper = place.wrapper
    if isinstance(wrapper, AdaptedLayer):
        raise ValueError(
            f"modules_to_save names {place.path}, which another adapter targets; choose one of the two"
        )
    if inside := [path for path, m in place.module.named_modules() if path and _undoes(m)]:
        raise ValueError(
            f"modules_to_save names {place.path}, inside which, at {inside[0]}, an invertible adapter is undone; name that "
            "module itself"
        )
    if not isinstance(wrapper, ModulesToSaveWrapper):
        wrapper = ModulesToSaveWrapper(place.module, switch)
        place.replace(wrapper)
    wrapper.add(name)


def _undoes(module: nn.Module) -> bool:
    return any(isinstance(tap, InverseTap) for tap in taps_on(module))


def _add_token_rows(
    place: Place, tied: Sequence[Place], rows: list[int], name: str, switch: Switch
) -> list[Slot]:
    """Train rows of an embedding, and the same rows of the output layer that is tied to it."""
    config = TrainableTokensConfig(token_indices=rows, target_modules=[place.path])
    slot = _token_layer(place, switch).add(name, TrainableTokens(), config, place.path)
    return [slot, *_twins(tied, slot, lambda twin: _token_layer(twin, switch))]


def _twins(tied: Sequence[Place], slot: Slot, wrap: Callable[[Place], AdaptedLayer]) -> Iterable[Slot]:
    """Give every layer that is tied to an adapted one a slot with the same parameters."""
    for place in tied:
        twin = wrap(place).add(slot.name, slot.method, slot.config, place.path)
        twin.owner = slot
        slot.method.become_twin(twin, slot)
        yield twin


def _token_layer(place: Place, switch: Switch) -> AdaptedLayer:
    if not isinstance(place.wrapper, TrainableTokensWrapper):
        kind = kind_of(place.module)
        if kind is None or isinstance(place.wrapper, (AdaptedLayer, ModulesToSaveWrapper)):
            raise ValueError(
                f"trainable_token_indices cannot be set on {place.path} ({type(place.wrapper).__name__})"
            )
        place.replace(TrainableTokensWrapper(AdaptedLayer(place.module, kind, switch)))
    layer = place.wrapper.token_adapter
    assert isinstance(layer, AdaptedLayer)
    return layer


def remove(model: nn.Module, name: str) -> None:
    """Take an adapter out of a model, and every wrapper that is left with nothing."""
    for _, layer in list(adapted_layers(model)):
        if name in layer.slots:
            layer.remove(name)
    for _, wrapper in list(wrappers(model)):
        if isinstance(wrapper, ModulesToSaveWrapper):
            wrapper.remove(name)
    for place in places(model).values():
        if (bare := _without_empty_wrappers(place.wrapper)) is not place.wrapper:
            place.replace(bare)
    restore_fast_paths(model)


def _without_empty_wrappers(module: nn.Module) -> nn.Module:
    if isinstance(module, TrainableTokensWrapper) and not module.token_adapter.slots:
        return module.token_adapter.base_layer
    if isinstance(module, ModulesToSaveWrapper) and not len(module.modules_to_save):
        return module.original_module
    if isinstance(module, AdaptedLayer):
        module.base_layer = _without_empty_wrappers(module.base_layer)
        if not module.slots:
            module.unmerge()
            return module.base_layer
    return module
