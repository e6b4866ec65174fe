"""How much several SHiRA adapters get in each other's way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...injection.walk import adapted_layers
from ...peft_model import PeftModel


@dataclass(frozen=True)
class MaskOverlap:
    """How the masks of several adapters lie over each other.

    Attributes:
        entries: number of entries of each adapter.
        changed: number of entries of the weights that at least one of them changes.
        shared: number of those that two or more change.
    """

    entries: dict[str, int]
    changed: int
    shared: int

    @property
    def share(self) -> float:
        """The shared part of the changed entries, between 0 and 1."""
        return self.shared / self.changed if self.changed else 0.0


@dataclass(frozen=True)
class ShiraOverlap:
    """The overlap of several adapters in each layer, by its path in the base model, and in total. Prints as a table."""

    layers: dict[str, MaskOverlap]
    total: MaskOverlap

    def __str__(self) -> str:
        rows = [*self.layers.items(), ("total", self.total)]
        width = max(len(path) for path, _ in rows)
        return "\n".join(
            f"{path:<{width}}  {o.shared:>9,d} of {o.changed:>11,d} changed entries shared  {o.share:7.2%}"
            for path, o in rows
        )


def shira_overlap(model: nn.Module, adapter_names: Sequence[str] | None = None) -> ShiraOverlap:
    """Return how much several SHiRA adapters overlap: entries that more than one of them changes are where they interfere.

    Args:
        model: a ``PeftModel``, or a model with injected adapters.
        adapter_names: the adapters; all that have masks by default.

    Raises:
        ValueError: fewer than two adapters are named, or one of them has no mask in this model.
    """
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    slots = [s for _, layer in adapted_layers(bare) for s in layer.slots.values() if s.method.in_weight]
    present = list(dict.fromkeys(slot.name for slot in slots))
    names = present if adapter_names is None else list(adapter_names)
    if unknown := [name for name in names if name not in present]:
        raise ValueError(f"adapters {unknown} have no SHiRA mask in this model; those that have: {present}")
    if len(names) < 2:
        raise ValueError(f"an overlap needs two adapters or more, not {names}")
    by_path: dict[str, dict[str, Tensor]] = {}
    for slot in slots:
        if slot.name in names:
            rows, columns = slot.method.entries(slot)[0].long()
            by_path.setdefault(slot.path, {})[slot.name] = rows * slot.kind.in_features + columns
    layers = {path: _overlap(places, names) for path, places in by_path.items()}
    sums = {n: sum(o.entries[n] for o in layers.values()) for n in names}
    total = MaskOverlap(sums, sum(o.changed for o in layers.values()), sum(o.shared for o in layers.values()))
    return ShiraOverlap(layers, total)


def _overlap(places: dict[str, Tensor], names: Sequence[str]) -> MaskOverlap:
    _, counts = torch.unique(torch.cat(list(places.values())), return_counts=True)
    entries = {name: len(places[name]) if name in places else 0 for name in names}
    return MaskOverlap(entries, len(counts), int((counts > 1).sum()))
