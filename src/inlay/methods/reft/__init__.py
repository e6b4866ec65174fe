"""ReFT: change what a few positions of a sequence are to the next block. Wu et al. 2024, https://arxiv.org/abs/2404.03592.

    LoReFT, NoReFT      h_p' = h_p + (act(W h_p + b) - R h_p) R        h_p[d], W[r, d], b[r], R[r, d]
    DiReFT              h_p' = h_p +  act(W h_p + b) R

h_p is what a block puts out at position p, one of the first or of the last; act is nothing unless asked for. R R' = I in LoReFT:
h_p' agrees with W h_p + b in the r directions of R, and with h_p in all others. Dropout acts on h_p', as the authors have it.

R is kept as r x d free numbers, whose rows are orthonormalised in each forward pass; an orthonormal R is its own. (PyTorch's
parametrisation, which pyreft and AdapterHub use, keeps a second matrix [d, d], and its R is zero after one step of weight
decay.) A fresh adapter is not the identity, as the authors' is not: W and R are drawn independently. It is with
``init_reft_weights="identity"``, which starts with W = R and b = 0. What is done depends on the position, so there is no weight
to merge it into.
Authors' code: https://github.com/stanfordnlp/pyreft
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...injection.targets import block_index, find_targets, matches
from ...injection.walk import Place, Site
from ...kernels.low_rank import any_gradient
from ...kinds import LayerKind
from ...kinds.output import Positioned
from ...layers.sequence import Outer
from ...layers.taps import Hung
from ...method import Column, Method, Slot
from ..bottleneck.activations import activation
from ..bottleneck.families import FAMILIES
from ..bottleneck.sublayers import find_sublayers
from .config import ReftConfig

FIRST, LAST, BOTH = "reft_prefix", "reft_suffix", "reft_both"
"""Columns: the intervention on the first positions, on the last ones, and the one that is both where weights are tied."""


class Intervention(nn.Module):
    """W and b (``learned_source``) and R, or the free numbers that R is made of (``projection``)."""

    def __init__(self, width: int, r: int, where: dict[str, Any]) -> None:
        super().__init__()
        self.learned_source = nn.Linear(width, r, **where)
        self.projection = nn.Linear(width, r, bias=False, **where)


class Reft(Method, name="REFT"):
    """h_p' = h_p + (act(W h_p + b) - R h_p) R; see the top of this file."""

    config = ReftConfig
    mergeable = False
    saves_embedding = False

    # ------------------------------------------------------------------ where

    def complete(self, config: ReftConfig, model: nn.Module) -> None:
        """Leave ``target_modules`` open: without them, the blocks are found by their structure."""

    def sites(self, config: ReftConfig, model: nn.Module, known: Mapping[str, Place]) -> list[Site]:
        found = _named(known, config) if config.target_modules else _blocks(model, known, config)
        numbers = {number for number, _ in found.values()}
        if config.layers != "all" and (beyond := sorted(set(config.layers) - numbers)):
            raise ValueError(
                f"layers={beyond} name no blocks; there are {sorted(n for n in numbers if n is not None)}"
            )
        places = {id(place.module): place for place in known.values()}
        return [
            Site(
                known[path],
                Positioned(
                    known[path].module,
                    around=[_outer(module, places) for module in known[path].inside],
                    like=like,
                    width=config.hidden_size,
                    index=number,
                ),
            )
            for path, (number, like) in found.items()
            if config.layers == "all" or number in config.layers
        ]

    # ------------------------------------------------------------------ what

    def build(self, kind: LayerKind, config: ReftConfig, path: str) -> dict[str, Column]:
        if config.orthogonality and config.r > kind.out_features:
            raise ValueError(
                f"r={config.r} orthonormal directions do not fit into the {kind.out_features} of {path}; lower r"
            )
        where: dict[str, Any] = {"device": kind.device, "dtype": kind.dtype}
        return {name: Intervention(kind.out_features, config.r, where) for name in columns_of(config)}

    def init(self, slot: Slot) -> None:
        config: Any = slot.config
        for name in slot.columns:
            source, projection = slot[name].learned_source, slot[name].projection
            if config.orthogonality:
                _fill_orthonormal(projection.weight)
            else:
                nn.init.kaiming_uniform_(projection.weight, a=math.sqrt(5))
            if config.init_reft_weights == "random":
                source.reset_parameters()
                continue
            nn.init.zeros_(source.bias)
            with torch.no_grad():
                source.weight.copy_(
                    _directions(slot, name) if config.subtract_projection else torch.zeros(())
                )

    # ------------------------------------------------------------------ running

    def after(self, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        if y.shape[-1] != slot.kind.out_features:
            raise ValueError(
                f"the output of {slot.path} is {y.shape[-1]} wide, its adapter {slot.kind.out_features}; "
                "say the width with hidden_size"
            )
        config: Any = slot.config
        if y.dim() == 2:  # single positions
            return self.after(slot, x.unsqueeze(1), y.unsqueeze(1)).squeeze(1)
        before, back = x.unbind(-1)
        first = (before >= 0) & (before < config.prefix_positions)
        last = (back >= 0) & (back < config.suffix_positions)
        if BOTH in slot.columns:
            return _changed(slot, BOTH, y, first | last, config.prefix_positions + config.suffix_positions)
        h = y
        if FIRST in slot.columns:
            h = _changed(slot, FIRST, h, first & ~last, config.prefix_positions)
        if LAST in slot.columns:
            h = _changed(slot, LAST, h, last, config.suffix_positions)
        return h


def columns_of(config: ReftConfig) -> list[str]:
    """Return the columns that a configuration asks for: none for positions that it leaves alone."""
    if config.tied_weights and config.prefix_positions and config.suffix_positions:
        return [BOTH]
    return [FIRST] * bool(config.prefix_positions) + [LAST] * bool(config.suffix_positions)


def orthonormal(free: Tensor) -> Tensor:
    """Return ``[r, d]`` with orthonormal rows, of which the first k span what the first k of ``free[r, d]`` do; float32 at least.

    Rows that are orthonormal stay as they are.
    """
    q, triangle = torch.linalg.qr(free.to(torch.promote_types(free.dtype, torch.float32)).mT)
    rows: Tensor = q.mT
    return rows * torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(q.dtype)[:, None]


def _changed(slot: Slot, name: str, h: Tensor, wanted: Tensor, most: int) -> Tensor:
    """Return ``h[rows, positions, d]`` with the intervention at the wanted positions, of which a row has ``most`` at most."""
    if h.shape[1] <= most:
        return torch.where(wanted[..., None], _intervened(slot, name, h), h)
    # Each row's wanted positions, filled up with others, no position twice.
    chosen = wanted.to(h.dtype).topk(most, dim=1).indices
    index = chosen[..., None].expand(-1, -1, h.shape[-1])
    states = h.gather(1, index)
    changed = torch.where(wanted.gather(1, chosen)[..., None], _intervened(slot, name, states), states)
    return h.scatter(1, index, changed)


def _intervened(slot: Slot, name: str, h: Tensor) -> Tensor:
    config: Any = slot.config
    source, directions = slot[name].learned_source, _directions(slot, name)
    w, b, r = source.weight, source.bias.to(h.dtype), directions.to(h.dtype)
    if config.non_linearity is None:
        z = F.linear(h, (w - directions if config.subtract_projection else w).to(h.dtype), b)
    else:
        z = activation(config.non_linearity)(F.linear(h, w.to(h.dtype), b))
        z = z - F.linear(h, r) if config.subtract_projection else z
    changed = (h + z @ r).to(h.dtype)  # autocast gives the product in its own dtype
    return F.dropout(changed, config.dropout) if slot.layer.training and config.dropout else changed


def _directions(slot: Slot, name: str) -> Tensor:
    """Return R; where no gradient is asked for, the kept one while the numbers that it is made of have not changed."""
    free: Tensor = slot[name].projection.weight
    if not getattr(slot.config, "orthogonality", True):
        return free
    if any_gradient(free):
        return orthonormal(free)
    return slot.kept(name, [free], lambda: orthonormal(free))


def _fill_orthonormal(weight: Tensor) -> None:
    drawn = torch.randn(
        weight.shape, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32)
    )
    with torch.no_grad():
        weight.copy_(orthonormal(drawn))


Numbered = dict[str, tuple[int | None, nn.Module | None]]
"""Places by their paths: the numbers of their blocks, and modules of their width."""


def _named(known: Mapping[str, Place], config: ReftConfig) -> Numbered:
    return {path: (block_index(path), None) for path in find_targets(known, config)}


def _blocks(model: nn.Module, known: Mapping[str, Place], config: ReftConfig) -> Numbered:
    found: Numbered = {
        f.path: (f.block, f.like) for f in find_sublayers(known) if f.part == "feedforward" and f.path
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no block that could be told by the names of its parts "
            f"(known: {', '.join(family.name for family in FAMILIES)}); name modules with target_modules=[...], "
            "or describe the blocks with inlay.register_family(Family(...))"
        )
    return {path: value for path, value in found.items() if not matches(path, config.exclude_modules)}


def _outer(module: nn.Module, places: Mapping[int, Place]) -> Outer:
    place = places.get(id(module))
    return Outer(module, None if place is None else Hung(*place.parents[0]))
