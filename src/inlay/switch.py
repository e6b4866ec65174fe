"""The switch: which adapters are on. One object serves all adapted layers of a model, so switching costs O(1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any

import torch

from .composition import Block

BASE = "__base__"
"""In a route: the sample that runs through the base model alone."""


@dataclass(frozen=True)
class Setting:
    """Which adapters a forward pass uses.

    Attributes:
        active: names of the adapters that are on, in the order in which they act.
        enabled: False runs the base model.
        route: one adapter name for each sample of the batch, for mixed batches.
        composition: how those that are on act together; None where they simply act in order.
        skip_layers: blocks of the model whose adapters are off, by their index.
    """

    active: tuple[str, ...] = ()
    enabled: bool = True
    route: tuple[str, ...] | None = None
    composition: Block | None = None
    skip_layers: frozenset[int] = frozenset()


class Switch:
    """The setting of a model, and what single threads set apart for the length of a ``with`` block.

    ``epoch`` counts the changes made for the whole model: a layer that was set apart from the others (PEFT allows it)
    falls back in line at the next one.
    """

    def __init__(self) -> None:
        self.setting = Setting()
        self.by_thread: dict[int, Setting] = {}
        self.epoch = 0

    def now(self) -> Setting:
        """Return the setting that holds in this thread."""
        if not self.by_thread:
            return self.setting
        if (
            torch.compiler.is_compiling()
        ):  # a traced program cannot ask which thread it is; it is traced inside the block
            return next(iter(self.by_thread.values()))
        return self.by_thread.get(get_ident(), self.setting)

    def is_temporary(self) -> bool:
        """Whether the setting that holds in this thread ends with a ``with`` block of its own."""
        return bool(self.by_thread) and get_ident() in self.by_thread

    def change(self, **changes: Any) -> None:
        """Change the setting for the whole model."""
        self.setting = replace(self.setting, **changes)
        self.epoch += 1

    @contextmanager
    def within(self, **changes: Any) -> Iterator[None]:
        """Change the setting for this thread and the length of the block."""
        thread = get_ident()
        outer = self.by_thread.get(thread)
        self.by_thread[thread] = replace(outer or self.setting, **changes)
        try:
            yield
        finally:
            if outer is None:
                del self.by_thread[thread]
            else:
                self.by_thread[thread] = outer
