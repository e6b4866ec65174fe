"""The sub-layers of a transformer, found by the names of its blocks' children (``families.py``)."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ...errors import PeftWarning
from ...injection.walk import Place, unwrapped
from ...kinds import Norm, kind_of
from ...kinds.output import own_widths
from ...layers.taps import Hung, SubLayer, first_argument
from .families import FAMILIES, Family, Points


@dataclass(frozen=True)
class Found:
    """A sub-layer of a model: which part of which block, and where its points are."""

    block: int
    path: str
    part: str
    exit: Place
    like: nn.Module
    sublayer: SubLayer


def find_sublayers(known: Mapping[str, Place]) -> list[Found]:
    """Return the sub-layers of a model, blocks in their order, the attention before the feed-forward block.

    Blocks that stand in one list with others, but are not known, are named in a warning.

    Args:
        known: every module of the bare model by its path.
    """
    families = {path: f for path in ("", *known) if (f := _family_of(path, known)) is not None}
    _warn_of_strangers(families, known)
    return [
        _found(block, part, getattr(family, part), known, path)
        for block, (path, family) in enumerate(families.items())
        for part in ("attention", "feedforward")
    ]


def _prefix(path: str) -> str:
    return f"{path}." if path else ""


def _family_of(path: str, known: Mapping[str, Place]) -> Family | None:
    return next((family for family in FAMILIES if _fits(family, known, path)), None)


def _fits(family: Family, known: Mapping[str, Place], path: str) -> bool:
    prefix = _prefix(path)
    points = (family.attention, family.feedforward)
    if any(
        _resolve(name, known, prefix) is None for p in points for name in (p.entry, p.exit, p.norm) if name
    ):
        return False
    if family.without and prefix + family.without in known:
        return False
    block = known[path].module if path else None
    if family.flag is not None and getattr(block, family.flag[0], None) != family.flag[1]:
        return False
    return family.order is None or (block is not None and _names_in_order(block, *family.order))


def _names_in_order(block: nn.Module, first: str, second: str) -> bool:
    """Whether a block's ``forward`` names one of its children before another."""
    names = inspect.unwrap(type(block).forward).__code__.co_names
    return first in names and second in names and names.index(first) < names.index(second)


def _warn_of_strangers(families: Mapping[str, Family], known: Mapping[str, Place]) -> None:
    lists = {known[path].inside[-1] for path in families if path}
    strangers = [
        path
        for path, place in known.items()
        if path not in families and isinstance(place.inside[-1], nn.ModuleList) and place.inside[-1] in lists
    ]
    if strangers:
        warnings.warn(
            f"the blocks {strangers} have another structure than those beside them and get no adapter; describe them with "
            "inlay.register_family, or name modules with target_modules",
            PeftWarning,
            stacklevel=2,
        )


def _resolve(names: str, known: Mapping[str, Place], prefix: str) -> Place | None:
    return next((known[prefix + name] for name in names.split("|") if prefix + name in known), None)


def _found(block: int, part: str, points: Points, known: Mapping[str, Place], path: str) -> Found:
    prefix = _prefix(path)
    entry, last = (_resolve(names, known, prefix) for names in (points.entry, points.exit))
    norm = _resolve(points.norm, known, prefix) if points.norm else None
    assert entry is not None and last is not None
    like = _like(last, norm, entry)
    sublayer = SubLayer(
        Hung(*entry.parents[0]),
        first_argument(entry.module),
        None if norm is None else Hung(*norm.parents[0]),
    )
    return Found(block, path, part, last, like, sublayer)


def _like(last: Place, norm: Place | None, entry: Place) -> nn.Module:
    """Return a layer that has the width of a sub-layer's output: a norm of the residual stream, or the last layer of all."""
    siblings = [unwrapped(m)[0] for m in last.inside[-1]._modules.values() if m is not None]
    norms = [place.module for place in (norm, entry) if place is not None]
    for module in norms:
        if isinstance(kind_of(module), Norm):
            return module
    return next((m for m in (last.module, *reversed(siblings)) if own_widths(m) is not None), last.module)
