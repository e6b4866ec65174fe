"""A fusion is saved with its members beside it, and loaded with those that the model does not have yet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from torch import nn

from ..composition.choice import is_fusion
from ..config import CONFIG_NAME, HUB_ARGUMENTS
from .folder import locate
from .saved_adapter import SavedAdapter

if TYPE_CHECKING:
    from ..peft_model import PeftModel


def with_members(names: list[str], model: PeftModel) -> list[str]:
    """Return adapters to save, and with each fusion its members."""
    configs: dict[str, Any] = model.peft_config
    needed = [member for name in names if is_fusion(configs[name]) for member in configs[name].members]
    return list(dict.fromkeys([*names, *needed]))


@contextmanager
def members_loaded(
    model: PeftModel, name: str, saved: SavedAdapter, hub: dict[str, Any], options: dict[str, Any]
) -> Iterator[SavedAdapter]:
    """Load the members that a fusion lacks, and take them out again if what is done inside fails.

    Gives the adapter as it fits its members.

    Args:
        model: where to.
        name: the fusion's name in the model.
        saved: the fusion, as it was found; other adapters need nothing here.
        hub: how it was found: subfolder, revision, token, ...
        options: passed to ``load_adapter``.

    Raises:
        ValueError: a member is neither loaded nor beside the fusion, or AdapterHub's fusion does with them what Inlay's does not.
    """
    loaded: list[str] = []
    try:
        for member in _members(saved, name) if name not in model.peft_config else ():
            if member not in model.peft_config:
                origin, arguments = _place_of(member, saved.origin, hub)
                model.load_adapter(origin, member, **options, **arguments)
                loaded.append(member)
        yield _where_members_sit(saved, model) if saved.everywhere else saved
    except BaseException:
        for member in loaded:
            model.delete_adapter(member)
        raise


def model_with_fusion(
    cls: type[PeftModel],
    model: nn.Module,
    name: str,
    saved: SavedAdapter,
    hub: dict[str, Any],
    options: dict[str, Any],
) -> PeftModel:
    """Return a new ``PeftModel`` of the class with a saved fusion and its members. If it fails, the model is as it was.

    Args:
        cls: the class.
        model: the base model; it is changed in place.
        name: name to give the fusion.
        saved: the fusion, as it was found.
        hub: how it was found: subfolder, revision, token, ...
        options: passed to ``from_pretrained`` of the members.

    Raises:
        ValueError: a member is not beside the fusion.
    """
    first = _members(saved, name)[0]
    origin, arguments = _place_of(first, saved.origin, hub)
    frozen = [p for p in model.parameters() if p.requires_grad]
    fused: PeftModel = cls.from_pretrained(model, origin, first, **options, **arguments)
    try:
        fused._take_in(saved, name, options | {"torch_device": None}, hub)
    except BaseException:
        fused.unload()
        for p in frozen:
            p.requires_grad_(True)
        raise
    return fused


def _members(saved: SavedAdapter, name: str) -> list[str]:
    config: Any = saved.config
    if not is_fusion(config):
        return []
    if name in config.members:
        raise ValueError(
            f"the fusion at {saved.origin} has a member {name!r} itself; load it by another name, such as adapter_name='fusion'"
        )
    return list(config.members)


def _where_members_sit(saved: SavedAdapter, model: PeftModel) -> SavedAdapter:
    from ..adapterhub.fusion import where_members_sit

    members: list[str] = saved.config.members  # type: ignore[attr-defined]
    configs = {member: model.peft_config[member] for member in members if member in model.peft_config}
    paths = {member: {slot.path for slot in model.base_model.slots(member)} for member in configs}
    return replace(saved, tensors=where_members_sit(str(saved.origin), saved.tensors, configs, paths))


def _place_of(member: str, origin: str | os.PathLike[str], hub: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return where a member is: beside the fusion's folder, or inside it where the fusion is named "default"."""
    rest = {k: v for k, v in hub.items() if k in HUB_ARGUMENTS}
    own = "" if member == "default" else member
    folder = PurePosixPath(hub.get("subfolder") or "")
    if Path(origin).is_dir():
        path = Path(origin) / folder
        places = [(str(path.resolve().parent), own), (str(path), own)]
    else:
        places = [(str(origin), str(folder.parent / own)), (str(origin), str(folder / own))]
    for base, subfolder in places:
        subfolder = "" if subfolder == "." else subfolder
        if (base, subfolder) in ((str(Path(origin) / folder), ""), (str(origin), str(folder))):
            continue  # the fusion itself
        try:
            locate(base, CONFIG_NAME, subfolder=subfolder, **rest)
        except ValueError:
            continue
        return base, rest | {"subfolder": subfolder or None}
    raise ValueError(
        f"the fusion at {origin} needs its member {member!r}, which is not beside it; load it first: "
        f"load_adapter(path, {member!r})"
    )
