"""Taking pruned ranks out of an AdaLoRA adapter: out of its layers and, with their moments, out of the optimizers.

A[..., r, in], E[..., r, 1], B[..., out, r] become A[..., kept, in], E[..., kept, 1], B[..., out, kept]. Where the parameters
cannot be replaced, the pruned ranks are kept at E = 0 instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...training.optimizer_state import Change, follow, hindrance

if TYPE_CHECKING:
    from ...method import Slot
    from .budget import Batch

FACTORS = ("lora_A", "lora_E", "lora_B")


def taken(tensor: Tensor, column: str, keep: Tensor) -> Tensor:
    """Return the kept ranks, ``keep[r]`` of bool, of A, E or B, or of anything of such a shape."""
    return tensor.index_select(-1 if column == "lora_B" else -2, keep.nonzero().flatten().to(tensor.device))


def set_to_zero(found: Sequence[Batch], kept: Sequence[Tensor]) -> None:
    """Set the E of ranks that are not kept to zero; ``kept`` is ``[matrix, r]`` of bool for each batch."""
    values: list[Tensor] = [e for batch in found for e in batch.e]
    masks = [
        m
        for batch, keep in zip(found, kept, strict=True)
        for m in keep.to(batch.e[0]).unsqueeze(-1).unbind(0)
    ]
    torch._foreach_mul_(values, masks)


def take_out(slots: Sequence[Slot], kept: Mapping[str, Tensor]) -> str | None:
    """Give layers and optimizers smaller parameters without the pruned ranks.

    Returns:
        None, or the reason why it cannot be done; nothing is changed then.
    """
    changes = [
        (slot, column, _change(slot[column], column, kept[slot.path]))
        for slot in slots
        if not bool(kept[slot.path].all())
        for column in FACTORS
    ]
    trained = [change for _, _, change in changes if change.old.requires_grad]
    if (reason := hindrance(trained)) is None:
        follow(trained)
        for slot, column, change in changes:
            _install(slot, column, change.new)
    return reason


def resize(slot: Slot, r: int) -> None:
    """Give a layer parameters of another rank, for values that are about to be loaded."""
    for column in FACTORS if r != slot["r"] else ():
        old = slot[column]
        shape = (*old.shape[:-1], r) if column == "lora_B" else (*old.shape[:-2], r, old.shape[-1])
        _install(slot, column, nn.Parameter(old.new_empty(shape), old.requires_grad))


def _change(old: nn.Parameter, column: str, keep: Tensor) -> Change:
    take = partial(taken, column=column, keep=keep)
    new = nn.Parameter(take(old.detach()), old.requires_grad)
    new.grad = None if old.grad is None else take(old.grad)
    return Change(old, new, take)


def _install(slot: Slot, column: str, new: nn.Parameter) -> None:
    slot.layer.column(column)[slot.name] = new
    slot.layer.column("r")[slot.name] = slot["lora_E"].shape[-2]
    slot.cache.clear()
