"""Parameters that change shape while they are trained: the optimizers that hold them, and their moments, follow.

Writing another shape into ``parameter.data`` would break graphs that are still alive, which know the old shape. So a new
parameter takes the old one's place, here in every optimizer. An optimizer is known from its first step on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_KNOWN: WeakSet[Optimizer] = WeakSet()


@dataclass(frozen=True)
class Change:
    """A parameter, the one that takes its place, and how a tensor of the one's shape becomes one of the other's.

    Without ``take`` the two have nothing in common, and what an optimizer remembers of the old one is forgotten.
    """

    old: nn.Parameter
    new: nn.Parameter
    take: Callable[[Tensor], Tensor] | None


@cache
def watch_optimizers() -> None:
    """Learn of every optimizer that makes a step from now on."""
    register_optimizer_step_post_hook(lambda optimizer, *_: note_optimizer(optimizer))


def note_optimizer(optimizer: Any) -> None:
    """Learn of an optimizer that has made no step yet."""
    _KNOWN.add(getattr(optimizer, "optimizer", optimizer))  # accelerate puts one around it


def hindrance(changes: Sequence[Change]) -> str | None:
    """Say why parameters cannot be replaced in the optimizers that train them, or return None where they can."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "a distributed run holds its parameters"
    held: dict[int, list[Optimizer]] = {}
    for optimizer in _KNOWN:
        for group in optimizer.param_groups:
            for p in group["params"]:
                held.setdefault(id(p), []).append(optimizer)
    for change in changes:
        if id(change.old) not in held:
            return "no optimizer of PyTorch is known to train them"
        if change.old._backward_hooks or getattr(change.old, "_post_accumulate_grad_hooks", None):
            return "hooks are registered on them"
        for optimizer in held[id(change.old)]:
            tensors = [v for v in optimizer.state.get(change.old, {}).values() if isinstance(v, Tensor)]
            if any(t.shape != change.old.shape and t.numel() > 1 for t in tensors):
                return f"the state of {type(optimizer).__name__} has other shapes than its parameters"
    return None


def follow(changes: Sequence[Change]) -> None:
    """Put new parameters in the place of old ones in every known optimizer, with what it remembers of them."""
    by_old = {id(change.old): change for change in changes}
    for optimizer in _KNOWN:
        for group in optimizer.param_groups:
            for index, p in enumerate(group["params"]):
                if (change := by_old.get(id(p))) is None:
                    continue
                group["params"][index] = change.new
                remembered = optimizer.state.pop(p, None)
                if remembered and change.take is not None:
                    optimizer.state[change.new] = {
                        key: change.take(v) if isinstance(v, Tensor) and v.shape == p.shape else v
                        for key, v in remembered.items()
                    }
