"""Which rows of a batch belong to which adapter.

A mixed batch says it sample by sample (``adapter_names``), ``BatchSplit`` and ``Parallel`` say it in runs. Where a layer
receives several rows of a sample, as in ``[batch * beams, ...]``, they lie together.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..switch import BASE
from . import BatchSplit, Block


@dataclass(frozen=True)
class Groups:
    """The rows of a mixed batch, those of one adapter together.

    Attributes:
        names: the adapter of each group; ``BASE`` for the rows of none.
        sizes: the number of samples of each group.
        order: the samples, group by group; None where they lie in this order already.
        repeats: the number of rows of each sample.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...] | None
    repeats: int = 1

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the rows ``x[rows, ...]`` of each group."""
        if self.order is not None:
            x = self._picked(x, torch.tensor(self.order, device=x.device))
        return torch.split(x, [size * self.repeats for size in self.sizes])

    def run(self, part: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Return ``part(name, rows of each tensor ...)`` of every group, in the batch's order."""
        rows = zip(*(self.split(tensor) for tensor in tensors), strict=True)
        return self.join([part(name, *own) for name, own in zip(self.names, rows, strict=True)])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the groups' rows in the batch's order."""
        if len(parts) == 1:
            return parts[0]
        together = torch.cat(list(parts))
        if self.order is None:
            return together
        return self._picked(together, torch.tensor(self.order, device=together.device).argsort())

    def _picked(self, x: Tensor, samples: Tensor) -> Tensor:
        if self.repeats == 1:
            return x.index_select(0, samples)
        return x.reshape(len(samples), self.repeats, *x.shape[1:]).index_select(0, samples).flatten(0, 1)


def groups_of(route: Sequence[str], known: Container[str], rows: int, reader: str) -> Groups:
    """Return the groups that a mixed batch has on one layer.

    Args:
        route: one adapter for each sample.
        known: the adapters that sit on the layer; the samples of others are the base's.
        rows: how many rows the layer received.
        reader: what received them, for the error.

    Raises:
        ValueError: the rows are no multiple of the samples.
    """
    names = tuple(name if name in known else BASE for name in route)
    grouped = _grouped if torch.compiler.is_compiling() else _remembered  # compilers warn of caches
    groups, repeats = grouped(names), rows_of_each(len(route), rows, reader)
    return groups if repeats == 1 else replace(groups, repeats=repeats)


def _grouped(names: tuple[str, ...]) -> Groups:
    order = tuple(sorted(range(len(names)), key=names.__getitem__))
    present = tuple(sorted(set(names)))
    sizes = tuple(names.count(name) for name in present)
    return Groups(present, sizes, None if order == tuple(range(len(names))) else order)


_remembered = lru_cache(maxsize=256)(_grouped)  # every layer of a model asks for the same


def rows_of_each(samples: int, rows: int, reader: str) -> int:
    """Return how many rows each sample of a mixed batch has.

    Raises:
        ValueError: the rows are no multiple of the samples.
    """
    if rows % samples:
        raise ValueError(
            f"adapter_names has {samples} entries but {reader} received {rows} rows, not a multiple of it"
        )
    return rows // samples


def runs_of(block: Block, rows: int, reader: str) -> list[int]:
    """Return how many rows each child of a ``BatchSplit`` or ``Parallel`` gets.

    Raises:
        ValueError: the rows are no multiple of those that the block has.
    """
    sizes = block.batch_sizes if isinstance(block, BatchSplit) else (1,) * len(block.children)
    if rows % sum(sizes):
        raise ValueError(f"{block!r} has {sum(sizes)} rows but {reader} received {rows}, no multiple of it")
    return [size * (rows // sum(sizes)) for size in sizes]
