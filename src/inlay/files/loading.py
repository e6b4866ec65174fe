"""Putting adapters that were found in folders into a model: whole, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..composition import Child
from ..composition.choice import is_fusion
from ..config import PeftConfig
from ..training.optimizer_state import Change, follow
from .checkpoint import IncompatibleKeys
from .disk_keys import prompt_network
from .fusions import fitted_to_members, members_of, place_of
from .saved_adapter import Loading, SavedAdapter

if TYPE_CHECKING:
    from ..peft_model import PeftModel

Active = Child | list[str]


def new_model(
    cls: type[PeftModel],
    model: nn.Module,
    name: str,
    saved: SavedAdapter,
    loading: Loading,
    add: Callable[[PeftModel], Active] | None = None,
) -> PeftModel:
    """Return a new ``PeftModel`` with a saved adapter, which is on. If anything fails, the base model is as it was.

    Args:
        cls: the class, unless the adapter's task asks for a more particular one than ``PeftModel``.
        model: the base model; it is changed in place.
        name: name to give the adapter.
        saved: the adapter, as it was found. A fusion brings its members, an AdapterHub union its other parts.
        loading: how it is to be loaded.
        add: loads what else there is to be, and returns what is to be on.

    Raises:
        ValueError: a member of a fusion is not beside it.
        AdapterFileError: the adapter does not fit the model.
    """
    from ..tasks import class_for  # only now: it is made of subclasses of PeftModel

    chosen = class_for(saved.config, cls)
    if is_fusion(saved.config):
        first = members_of(saved, name)[0]
        member, there = _member(model, first, saved, loading)

        def add_fusion(made: PeftModel) -> Active:
            take_in(made, name, saved, loading)
            return name

        return new_model(chosen, model, first, member, there, add_fusion)
    trained = [p for p in model.parameters() if p.requires_grad]
    known = vars(model).get("peft_config")
    made = chosen(model, saved.config, name, loading.autocast_adapter_dtype, loading.low_cpu_mem_usage)
    carried = [other for other in made.peft_config if other != name]  # another PeftModel's, on the same base
    try:
        _put(made, name, saved, loading, resume=loading.is_trainable)
        on: Active = [name, *_take_in_others(made, name, saved, loading)]
        made.set_adapter(on if add is None else add(made), inference_mode=not loading.is_trainable)
    except BaseException:
        if carried:
            for own in [own for own in reversed(made.peft_config) if own not in carried]:
                made.delete_adapter(own)
            cast("Any", model).peft_config = known
        else:
            made.unload()
        for p in trained:
            p.requires_grad_(True)
        raise
    made.eval()
    return made


def take_in(model: PeftModel, name: str, saved: SavedAdapter, loading: Loading) -> IncompatibleKeys:
    """Load a saved adapter, and the members that it needs; or new values for an adapter that is there. It is not turned on.

    Raises:
        ValueError: a member of a fusion is not beside it, or a part of a union has the name of another adapter.
        AdapterFileError: the adapter does not fit the model, which is then as it was.
    """
    new = name not in model.peft_config
    parts = [f"{name}_{kind}" for kind in saved.others]
    if new and (taken := [part for part in parts if part in model.peft_config]):
        raise ValueError(
            f"{saved.origin} holds several adapters, of which one would be named {taken[0]!r}, and there is one of that "
            "name; load it by another name"
        )
    there = [] if new else [own for own in (name, *parts) if own in model.peft_config]
    with _values_put_back(model, there if saved.others else []), taken_out_again(model):
        _load_members(model, members_of(saved, name) if new else [], saved, loading)
        saved = fitted_to_members(saved, model)
        if new:
            model.add_adapter(name, saved.config, loading.low_cpu_mem_usage, loading.autocast_adapter_dtype)
        with _fitted(model, name, saved.config):
            result = _put(model, name, saved, loading, resume=loading.is_trainable or not new)
        _take_in_others(model, name, saved, loading)
    if new or loading.is_trainable:
        model.base_model.set_requires_grad(name, requires_grad=loading.is_trainable)
    return result


def _put(
    model: PeftModel, name: str, saved: SavedAdapter, loading: Loading, resume: bool
) -> IncompatibleKeys:
    """Set an adapter's values and take up what it remembered when it was saved, where it remembers anything."""
    adapted, network = model.base_model, prompt_network(model, name)
    if network is not None:
        remembered = saved.remembered()
        adapted.prompts.check_state(name, remembered, saved.origin)
    result = saved.put_into(model, name, loading.low_cpu_mem_usage)
    if network is not None:
        network.load_state_dict(remembered)
    elif resume and name in adapted.methods and adapted.methods[name].steps():
        adapted.methods[name].load_state(list(adapted.own_slots(name)), saved.remembered())
    return result


def _take_in_others(model: PeftModel, name: str, saved: SavedAdapter, loading: Loading) -> list[str]:
    """Load what a folder holds beside an adapter, and return the names: ``<name>_<what it is>``. Callers undo it."""
    parts = {f"{name}_{kind}": part for kind, part in saved.others.items()}
    for own, part in parts.items():
        take_in(model, own, part, loading)
    return list(parts)


@contextmanager
def _values_put_back(model: PeftModel, names: list[str]) -> Iterator[None]:
    """Give adapters their values back, if it ends in an error: of several in one folder, one may fit and the next may not."""
    own = [p for name in names for p in model.base_model.adapter_parameters(name)]
    before = [p.detach().clone() for p in own]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for p, value in zip(own, before, strict=True):
                p.copy_(value)
        raise


@contextmanager
def taken_out_again(model: PeftModel) -> Iterator[None]:
    """Take out what was added inside, the last one first, if it ends in an error."""
    before = set(model.peft_config)
    try:
        yield
    except BaseException:
        for name in [name for name in reversed(model.peft_config) if name not in before]:
            model.delete_adapter(name)
        raise


def _load_members(model: PeftModel, members: list[str], fusion: SavedAdapter, loading: Loading) -> None:
    """Load the members of a fusion that the model does not have."""
    for name in members:
        if name not in model.peft_config:
            member, there = _member(model.get_base_model(), name, fusion, loading)
            take_in(model, name, member, there)


def _member(
    model: nn.Module, name: str, fusion: SavedAdapter, loading: Loading
) -> tuple[SavedAdapter, Loading]:
    origin, hub = place_of(name, fusion.origin, loading.hub)
    there = replace(loading, hub=hub)
    return SavedAdapter.find(model, origin, None, there), there


@contextmanager
def _fitted(model: PeftModel, name: str, config: PeftConfig) -> Iterator[None]:
    """Give an adapter the shapes of a saved configuration for values loaded inside; undone if that fails."""
    if name not in model.base_model.methods:  # a prompt, which has no shapes to fit
        yield
        return
    method, own = model.base_model.methods[name], model.peft_config[name]
    slots = list(model.base_model.own_slots(name))
    before = [(slot, {column: slot[column] for column in slot.columns}) for slot in slots]
    fields = dict(vars(own))
    try:
        for slot in slots:
            method.fit(slot, config)
        yield
    except BaseException:
        vars(own).update(fields)
        for slot, columns in before:
            for column, entry in columns.items():
                slot.layer.column(column)[name] = entry
        raise
    pairs = [(entry, slot[column]) for slot, columns in before for column, entry in columns.items()]
    follow([Change(old, new, None) for old, new in pairs if isinstance(old, nn.Parameter) and old is not new])
