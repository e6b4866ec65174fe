"""``layer_replication``: build a deeper model by stacking blocks anew, sharing their weights; each copy gets its own adapter.

Kim et al. 2023 (SOLAR, https://arxiv.org/abs/2312.15166) stack copies; here the copies share memory, so only adapters are added.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn


def replicate_layers(model: nn.Module, ranges: Sequence[Sequence[int]]) -> None:
    """Replace a model's list of blocks by the given ranges of it, in place.

    Args:
        model: a model with one list of like blocks, as transformers' decoders and encoders have.
        ranges: ``[start, end)`` pairs of block indices.

    Raises:
        ValueError: the model has no such list, or a range does not lie in it.
    """
    parent, attribute, blocks = _blocks(model)
    for start, end in ranges:
        if not 0 <= start < end <= len(blocks):
            raise ValueError(
                f"layer_replication range [{start}, {end}) does not lie in the {len(blocks)} blocks of the model"
            )
    order = [index for start, end in ranges for index in range(start, end)]
    setattr(
        parent,
        attribute,
        nn.ModuleList(_sharing_copy(blocks[index], position) for position, index in enumerate(order)),
    )
    config: Any = getattr(model, "config", None)
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if name in vars(config or object) and getattr(config, name) == len(blocks):
            setattr(config, name, len(order))
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in order]


def _blocks(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    lists = [
        (parent, attribute, child)
        for parent in model.modules()
        for attribute, child in parent._modules.items()
        if isinstance(child, nn.ModuleList) and len(child) and len({type(block) for block in child}) == 1
    ]
    outer = [
        item
        for item in lists
        if not any(item[2] is inner for _, _, other in lists for block in other for inner in block.modules())
    ]
    if len(outer) != 1:
        raise ValueError(
            f"layer_replication needs a model with exactly one list of like blocks; {type(model).__name__} has {len(outer)}"
        )
    return outer[0]


def _sharing_copy(block: nn.Module, position: int) -> nn.Module:
    """Return a copy of a block that shares its parameters and buffers and knows its new position."""
    shared: dict[int, Any] = {id(t): t for t in (*block.parameters(), *block.buffers())}
    new = copy.deepcopy(block, shared)
    for module in new.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = position  # type: ignore[assignment]
    return new
