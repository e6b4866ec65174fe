"""A setup: a folder of adapters and fusions with the composition in which they act, as AdapterHub saves it.

The adapters keep the names that they have in the composition, which are those of their folders. Asked for under another name than
"default", each gets that name in front: "x_lang", "x_task".
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from torch import nn

from ..adapterhub.setup import differences, read_setup
from ..composition import Block, Child, Fuse, Stack, names_in
from ..composition.choice import is_fusion
from ..config import HUB_ARGUMENTS
from ..errors import PeftWarning
from .saved_adapter import SavedAdapter

if TYPE_CHECKING:
    from ..peft_model import PeftModel


@dataclass(frozen=True)
class SavedSetup:
    """A setup as it was found.

    Attributes:
        origin: the folder, or the repository on the hub.
        tree: the composition, by the names of the folders.
        hub: where on the hub, or in which folder inside: revision, subfolder, ...
    """

    origin: Any
    tree: Child
    hub: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """The adapters, members before their fusion."""
        return list(dict.fromkeys(names_in(self.tree)))

    def place_of(self, name: str) -> dict[str, Any]:
        """Return where an adapter is: arguments for ``from_pretrained``."""
        return self.hub | {"subfolder": str(PurePosixPath(self.hub.get("subfolder") or "") / name)}


def find_saved_adapters(
    model: nn.Module, origin: str | os.PathLike[str], hub: dict[str, Any], **arguments: Any
) -> SavedAdapter | SavedSetup:
    """Return what there is at a place, adapter or setup.

    Args:
        model: the bare model.
        origin: the place.
        hub: where on the hub, or in which folder inside.
        **arguments: the others of ``SavedAdapter.find``. A setup has the configurations of its own adapters alone.
    """
    try:
        return SavedAdapter.find(model, origin, kwargs=hub, **arguments)
    except ValueError:  # looked for only now: on the hub, each look is a request
        known = {k: v for k, v in hub.items() if k in HUB_ARGUMENTS | {"subfolder"}}
        tree = read_setup(origin, **known) if arguments["config"] is None else None
        if tree is None:
            raise
    return SavedSetup(origin, tree, known)


def model_with_setup(
    cls: type[PeftModel], model: nn.Module, name: str, setup: SavedSetup, options: dict[str, Any]
) -> PeftModel:
    """Return a new ``PeftModel`` with the adapters of a setup, its composition on. If it fails, the model is as it was.

    Args:
        cls: the class.
        model: the base model; it is changed in place.
        name: "default", or what the adapters' names are to begin with.
        setup: the setup.
        options: those of ``from_pretrained``.
    """
    first = setup.names[0]
    frozen = [p for p in model.parameters() if p.requires_grad]
    made: PeftModel = cls.from_pretrained(
        model, setup.origin, _named(first, name), **options, **setup.place_of(first)
    )
    try:
        tree = _load_others(
            made, name, setup, options | {"torch_device": None}, {first: _all_of(list(made.peft_config))}
        )
        made.set_adapter(tree, inference_mode=not options["is_trainable"])
    except BaseException:
        made.unload()
        for p in frozen:
            p.requires_grad_(True)
        raise
    return made


def load_setup(model: PeftModel, name: str, setup: SavedSetup, options: dict[str, Any]) -> None:
    """Load the adapters of a setup, all or none, without turning them on; options are those of ``load_adapter``.

    Raises:
        ValueError: the model has an adapter of one of the names.
    """
    before = list(model.peft_config)
    if taken := [own for own in setup.names if _named(own, name) in before]:
        raise ValueError(
            f"the setup at {setup.origin} has an adapter {taken[0]!r}, and there is one named {_named(taken[0], name)!r}; with "
            "another adapter_name, such as 'x', the adapters are named 'x_...'"
        )
    try:
        _load_others(model, name, setup, options, {})
    except BaseException:
        for loaded in [own for own in reversed(model.peft_config) if own not in before]:
            model.delete_adapter(loaded)
        raise


def _load_others(
    model: PeftModel, name: str, setup: SavedSetup, options: dict[str, Any], loaded: dict[str, Child]
) -> Child:
    """Load what is not loaded yet; return the composition by the names in the model."""
    for own in (own for own in setup.names if own not in loaded):
        where, before = setup.place_of(own), set(model.peft_config)
        saved = SavedAdapter.find(
            model.get_base_model(),
            setup.origin,
            None,
            options["is_trainable"],
            options["torch_device"],
            options["key_mapping"],
            False,
            where,
        )
        config: Any = saved.config
        if is_fusion(config):
            members = [_one(loaded, member, own) for member in config.members]
            saved = replace(saved, config=replace(config, members=members))
        model._take_in(saved, _named(own, name), options, where)
        loaded[own] = _all_of([n for n in model.peft_config if n not in before])
    tree = _renamed(setup.tree, loaded)
    for difference in dict.fromkeys(differences(tree, model.peft_config)):
        warnings.warn(
            f"{setup.origin}: {difference}, so outputs are not the same here", PeftWarning, stacklevel=4
        )
    return tree


def _named(own: str, name: str) -> str:
    return own if name == "default" else f"{name}_{own}"


def _all_of(names: list[str]) -> Child:
    """Return the adapters that a folder became: one, or the parts of a union, one after the other."""
    return names[0] if len(names) == 1 else Stack(*names)


def _one(loaded: Mapping[str, Child], member: str, fusion: str) -> str:
    node = loaded.get(member)
    if not isinstance(node, str):
        reason = "is several adapters in one" if node is not None else "is not in the setup"
        raise ValueError(f"the fusion {fusion!r} cannot have the member {member!r}, which {reason}")
    return node


def _renamed(node: Child, loaded: Mapping[str, Child]) -> Child:
    if not isinstance(node, Block):
        return loaded[node]
    if isinstance(node, Fuse):
        members = [str(loaded[str(member)]) for member in node.children]
        return Fuse(*members, name=str(loaded[str(node.name)]))
    return node.with_children([_renamed(child, loaded) for child in node.children])
