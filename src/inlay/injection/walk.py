"""Ways around a model that may already carry adapters: paths are those of the bare model, columns are not entered."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from ..kinds import LayerKind
from ..layers.extras import ModulesToSaveWrapper, TrainableTokensWrapper, find_saved
from ..layers.layer import AdaptedLayer
from ..layers.output import AdaptedOutput
from ..layers.taps import carry_taps


@dataclass
class Place:
    """One module of the bare model and where it hangs.

    Attributes:
        path: its path in the bare model.
        module: the module itself, without wrappers.
        wrapper: what hangs in its place now: the module, or the outermost wrapper around it.
        real_path: the wrapper's path in the model as it is now.
        parents: every (parent, attribute) that holds it; more than one where a module is shared.
        inside: the wrapped or bare modules on the way, from the root.
    """

    path: str
    module: nn.Module
    wrapper: nn.Module
    real_path: str
    parents: list[tuple[nn.Module, str]] = field(default_factory=list)
    inside: tuple[nn.Module, ...] = ()

    def replace(self, new: nn.Module) -> None:
        """Hang another module here, everywhere."""
        carry_taps(self.wrapper, new)
        for parent, attribute in self.parents:
            setattr(parent, attribute, new)
        self.wrapper = new


class Site(NamedTuple):
    """A place that an adapter is to sit on, and what kind of layer it is to the adapter's method."""

    place: Place
    kind: LayerKind


def unwrapped(module: nn.Module) -> tuple[nn.Module, str]:
    """Return the bare module under any wrappers, and the path from the one to the other (with a leading dot)."""
    path = ""
    while True:
        if isinstance(module, AdaptedLayer):
            module, path = module.base_layer, f"{path}.base_layer"
        elif isinstance(module, ModulesToSaveWrapper):
            module, path = module.original_module, f"{path}.original_module"
        elif isinstance(module, TrainableTokensWrapper):
            module, path = module.token_adapter, f"{path}.token_adapter"
        else:
            return module, path


def places(model: nn.Module) -> dict[str, Place]:
    """Return every module of the bare model by its path, in the order of ``named_modules``; shared ones under their first."""
    found: dict[str, Place] = {}
    by_id: dict[int, Place] = {}

    def visit(parent: nn.Module, path: str, real: str, inside: tuple[nn.Module, ...]) -> None:
        for attribute, child in parent._modules.items():
            if child is None:
                continue
            here, real_here = (f"{p}.{attribute}" if p else attribute for p in (path, real))
            bare, inner = unwrapped(child)
            place = by_id.get(id(bare))
            if place is not None:
                place.parents.append((parent, attribute))
                continue
            place = by_id[id(bare)] = found[here] = Place(
                here, bare, child, real_here, [(parent, attribute)], (*inside, parent)
            )
            visit(bare, here, real_here + inner, place.inside)

    visit(model, "", "", ())
    return found


def path_in_files(path: str, outputs: Collection[str]) -> str:
    """Return a name by which files know a module or parameter: as if no adapter sat on an output.

    Args:
        path: the name in the model as it is.
        outputs: the names of the wrappers of adapted outputs, with the same beginning.
    """
    for outer in sorted(outputs, key=len, reverse=True):
        inner = f"{outer}.base_layer"
        if path == inner or path.startswith(f"{inner}."):
            path = outer + path[len(inner) :]
    return path


def adapted_outputs(model: nn.Module) -> list[str]:
    """Return the paths, in the model as it is, of the wrappers of adapted outputs."""
    return [path for path, wrapper in wrappers(model) if isinstance(wrapper, AdaptedOutput)]


def places_to_adapt(model: nn.Module, config: Any) -> dict[str, Place]:
    """Return the places outside the modules that an adapter saves whole."""
    known = places(model)
    saved = tuple(f"{path}." for path in find_saved(known, getattr(config, "modules_to_save", None) or ()))
    return {path: place for path, place in known.items() if not f"{path}.".startswith(saved)}


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Yield every adapted layer with its path in the model as it is, without entering columns."""
    for real, wrapper in wrappers(model):
        if isinstance(wrapper, AdaptedLayer):
            yield real, wrapper


def wrappers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every wrapper with its path in the model as it is, outer ones before inner ones."""
    for place in places(model).values():
        path, module = place.real_path, place.wrapper
        while module is not place.module:
            yield path, module
            attribute = (
                "base_layer"
                if isinstance(module, AdaptedLayer)
                else "token_adapter"
                if isinstance(module, TrainableTokensWrapper)
                else "original_module"
            )
            path, module = f"{path}.{attribute}", getattr(module, attribute)
