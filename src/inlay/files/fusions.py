"""Which adapters are saved and loaded with a fusion, and where they are: its members, in folders beside it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

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


def members_of(saved: SavedAdapter, name: str) -> list[str]:
    """Return the members that a saved adapter needs beside it, being a fusion; none otherwise.

    Raises:
        ValueError: the fusion is to get the name of one of them.
    """
    config: Any = saved.config
    if not is_fusion(config):
        return []
    if name in config.members:
        raise ValueError(
            f"the fusion at {saved.origin} has a member {name!r} itself; load it by another name, such as adapter_name='fusion'"
        )
    return list(config.members)


def fitted_to_members(saved: SavedAdapter, model: PeftModel) -> SavedAdapter:
    """Return a fusion without what it holds of layers on which no member sits.

    Raises:
        ValueError: AdapterHub's fusion does with these members what Inlay's does not.
    """
    if not saved.everywhere:
        return saved
    from ..adapterhub.fusion import where_members_sit

    members: list[str] = saved.config.members  # type: ignore[attr-defined]
    configs = {member: model.peft_config[member] for member in members if member in model.peft_config}
    paths = {member: {slot.path for slot in model.base_model.slots(member)} for member in configs}
    return replace(saved, tensors=where_members_sit(str(saved.origin), saved.tensors, configs, paths))


def place_of(member: str, origin: str | os.PathLike[str], hub: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return where a member is: beside the fusion's folder, or inside it where the fusion is named "default".

    Args:
        member: its name.
        origin: where the fusion was found.
        hub: how it was found: subfolder, revision, token, ...

    Returns:
        the folder or repository, and how to find the member there.

    Raises:
        ValueError: it is not there.
    """
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
