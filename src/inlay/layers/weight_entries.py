"""Single entries of a weight: where an adapter's values stand, how they are read and written, and what tells contents apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..method import Slot

Stamp = tuple[Any, ...]
"""Tells one content of a weight from another: which slots, at which scale, with which tensors in which version."""


def stamp_of(slots: Sequence[Slot]) -> Stamp:
    """Return the stamp of the weight that holds these slots' values as they are now."""
    return tuple(
        ((id(slot), _buffers_of(slot)), slot["scaling"], _versions(slot.parameters())) for slot in slots
    )


def places_of(stamp: Stamp) -> list[Any]:
    """Return the part of a stamp that says where values stand, without what they are."""
    return [place for place, _, _ in stamp]


def _buffers_of(slot: Slot) -> tuple[Any, ...]:
    return _versions({column: slot[column] for column in slot.method.saved_buffers})


def _versions(tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
    return tuple((id(t), t.data_ptr(), t._version) for t in tensors.values())


def positions_of(slot: Slot, w: Tensor) -> Tensor:
    """Return where a slot's values stand, as numbers into the flattened weight in the layer's own layout.

    Raises:
        ValueError: a place lies outside of the weight or is named twice, as in a damaged file.
    """
    key = (_buffers_of(slot), w.shape)
    if slot.cache.get("positions_of") != key:
        (rows, columns), width = slot.method.entries(slot)[0].long(), slot.kind.in_features
        _check_places(rows, columns, w.numel() // width, width, slot)
        strides = slot.kind.matrix(torch.empty(w.shape, device="meta")).stride()
        if len(strides) == 3:  # rows of all experts are numbered through
            first = (rows // slot.kind.out_features) * strides[0] + (rows % slot.kind.out_features) * strides[
                1
            ]
        else:
            first = rows * strides[0]
        slot.cache.update(positions_of=key, positions=first + columns * strides[-1])
    positions: Tensor = slot.cache["positions"]
    return positions


def _check_places(rows: Tensor, columns: Tensor, height: int, width: int, slot: Slot) -> None:
    places = rows * width + columns
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    ascending = bool((places[1:] > places[:-1]).all())
    if not bool(inside.all()) or (not ascending and len(torch.unique(places)) != len(places)):
        raise ValueError(
            f"adapter {slot.name!r} at {slot.path} names places outside of its weight [{height}, {width}], or one place twice: "
            "was it made for another base model, its file damaged, or only its configuration read from a file?"
        )


def take(w: Tensor, positions: Tensor) -> Tensor:
    """Return the entries of a weight at some positions."""
    if w.is_contiguous():
        return w.view(-1).index_select(0, positions)
    found: Tensor = w[torch.unravel_index(positions, w.shape)]
    return found


def put(w: Tensor, positions: Tensor, values: Tensor) -> None:
    """Write entries of a weight, in place."""
    if w.is_contiguous():
        w.view(-1).index_copy_(0, positions, values)
    else:
        w.index_put_(torch.unravel_index(positions, w.shape), values)


def sums(originals: Tensor, slot: Slot) -> Tensor:
    """Return the entries of W': half precision is added in float32 and rounded once."""
    values = slot.method.entries(slot)[1]
    exact = torch.promote_types(originals.dtype, torch.float32)
    total = originals.to(exact) + values.to(exact)
    return total.to(originals.dtype)
