"""Weights that two modules share, such as an input embedding and the output layer of a language model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import nn

from ..errors import PeftWarning
from ..layers.extras import ModulesToSaveWrapper
from .targets import embedding_ends
from .walk import Place

Groups = dict[int, list[Place]]


def shared_weights(known: Iterable[Place]) -> Groups:
    """Return the places whose modules share a weight, by the weight's identity."""
    groups: Groups = {}
    for place in known:
        weight = place.module._parameters.get("weight")
        if weight is not None:
            groups.setdefault(id(weight), []).append(place)
    return {key: group for key, group in groups.items() if len(group) > 1}


def tied_places(place: Place, tied: Groups) -> list[Place]:
    """Return the other places whose module has the very same weight."""
    group = tied.get(id(place.module._parameters.get("weight")), [])
    return [other for other in group if other is not place]


def with_tied(saved: Sequence[Place], tied: Groups) -> list[Place]:
    """Return modules to save together with all that share their weights."""
    found = list(saved)
    for place in saved:
        found += [other for other in tied_places(place, tied) if all(other is not p for p in found)]
    return found


def tie_copies(saved: Sequence[Place], name: str) -> None:
    """Let an adapter's copies of modules that share a weight share theirs as well."""
    first: dict[int, nn.Parameter] = {}
    for place in saved:
        wrapper: Any = place.wrapper
        copied = wrapper.modules_to_save[name]
        copied.weight = first.setdefault(id(wrapper.original_module.weight), copied.weight)


def check_tying(config: Any, adapted: Sequence[Place], saved: Sequence[Place], tied: Groups) -> None:
    """Warn where adapting one of two tied modules pulls them apart; refuse to tie what the method cannot.

    Raises:
        ValueError: ``ensure_weight_tying`` is set, and the method has no twins for a tied module that it adapts.
    """
    both = [(p.path, other.path) for p in (*adapted, *saved) for other in tied_places(p, tied)]
    if not both:
        return
    if not getattr(config, "ensure_weight_tying", False):
        warnings.warn(
            f"{both[0][0]} and {both[0][1]} share one weight, and the adapter changes only what it names: "
            "they are no longer tied. "
            "Set ensure_weight_tying=True to keep them tied.",
            PeftWarning,
            stacklevel=2,
        )
    elif any(tied_places(p, tied) for p in adapted):
        raise ValueError(
            f"ensure_weight_tying=True cannot keep these updates of {both[0][0]} and {both[0][1]} tied; use plain LoRA, "
            "name them in modules_to_save, or leave ensure_weight_tying at False"
        )


def note_untied(model: nn.Module) -> None:
    """Record in a model's configuration that its embeddings are no longer tied, so that saving it keeps both."""
    config = getattr(model, "config", None)
    first, last = embedding_ends(model)
    if first is None or last is None or not getattr(config, "tie_word_embeddings", False):
        return
    if not isinstance(first, ModulesToSaveWrapper) and first.weight is not last.weight:
        cast("Any", config).tie_word_embeddings = False
