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
from ..config import PeftConfig
from ..errors import PeftWarning
from .loading import new_model, take_in, taken_out_again
from .saved_adapter import Loading, SavedAdapter

if TYPE_CHECKING:
    from ..peft_model import PeftModel


@dataclass(frozen=True)
class SavedSetup:
    """A setup as it was found.

    Attributes:
        origin: the folder, or the repository on the hub.
        tree: the composition, by the names of the folders.
    """

    origin: Any
    tree: Child

    @property
    def names(self) -> list[str]:
        """The adapters, members before their fusion."""
        return list(dict.fromkeys(names_in(self.tree)))

    def part(self, model: nn.Module, name: str, loading: Loading) -> tuple[SavedAdapter, Loading]:
        """Return an adapter of the setup as it is found, and how it is to be loaded."""
        folder = PurePosixPath(loading.hub.get("subfolder") or "") / name
        there = replace(loading, hub=loading.hub | {"subfolder": str(folder)})
        return SavedAdapter.find(model, self.origin, None, there), there


def find_saved_adapters(
    model: nn.Module, origin: str | os.PathLike[str], config: PeftConfig | None, loading: Loading
) -> SavedAdapter | SavedSetup:
    """Return what there is at a place, adapter or setup; see ``SavedAdapter.find``.

    A setup has the configurations of its own adapters alone.
    """
    try:
        return SavedAdapter.find(model, origin, config, loading)
    except ValueError:  # looked for only now: on the hub, each look is a request
        tree = read_setup(origin, **loading.hub) if config is None else None
        if tree is None:
            raise
    return SavedSetup(origin, tree)


def model_with_setup(
    cls: type[PeftModel], model: nn.Module, name: str, setup: SavedSetup, loading: Loading
) -> PeftModel:
    """Return a new ``PeftModel`` with the adapters of a setup, its composition on. If it fails, the model is as it was.

    Args:
        cls: the class.
        model: the base model; it is changed in place.
        name: "default", or what the adapters' names are to begin with.
        setup: the setup.
        loading: how they are to be loaded.
    """
    first = setup.names[0]
    saved, there = setup.part(model, first, loading)

    def add_others(made: PeftModel) -> Child:
        return _load_others(made, name, setup, loading, {first: _all_of(list(made.peft_config))})

    return new_model(cls, model, _named(first, name), saved, there, add_others)


def load_setup(model: PeftModel, name: str, setup: SavedSetup, loading: Loading) -> None:
    """Load the adapters of a setup, all or none, without turning them on.

    Raises:
        ValueError: the model has an adapter of one of the names.
    """
    if taken := [own for own in setup.names if _named(own, name) in model.peft_config]:
        raise ValueError(
            f"the setup at {setup.origin} has an adapter {taken[0]!r}, and there is one named {_named(taken[0], name)!r}; with "
            "another adapter_name, such as 'x', the adapters are named 'x_...'"
        )
    with taken_out_again(model):
        _load_others(model, name, setup, loading, {})


def _load_others(
    model: PeftModel, name: str, setup: SavedSetup, loading: Loading, loaded: dict[str, Child]
) -> Child:
    """Load what is not loaded yet; return the composition by the names in the model."""
    for own in (own for own in setup.names if own not in loaded):
        before = set(model.peft_config)
        saved, there = setup.part(model.get_base_model(), own, loading)
        config: Any = saved.config
        if is_fusion(config):
            members = [_one(loaded, member, own) for member in config.members]
            saved = replace(saved, config=replace(config, members=members))
        take_in(model, _named(own, name), saved, there)
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
