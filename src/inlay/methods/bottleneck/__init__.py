"""Bottleneck adapters: a small network behind the blocks of a model. Houlsby et al. 2019, https://arxiv.org/abs/1902.00751.

    f(x) = W_up act(W_down x + b_down) + b_up       W_down[b, d], W_up[d, b], x[..., d]
    series      h = y + s f(x)                      x = y, or what the model makes of y (original_ln_before)
    parallel    h = y + s f(r)                      r = the residual of the sub-layer

y is the output of a sub-layer before the model adds r to it, or the output of any module (``target_modules``). Pfeiffer et al.
2021 (https://arxiv.org/abs/2005.00247) put one adapter after the feed-forward block, He et al. 2022
(https://arxiv.org/abs/2110.04366) put it beside, Compacter (Mahabadi et al. 2021, https://arxiv.org/abs/2106.04647) makes the
projections of Kronecker products. W_up and b_up start at zero, so that the model starts as itself; presets that follow another
library start as that one does (``presets.py``). f is not linear, so there is nothing to merge. MAD-X's invertible adapters are
in ``invertible.py``.
Authors' code: https://github.com/google-research/adapter-bert, https://github.com/rabeehk/compacter
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...blocks import start_gate
from ...injection.targets import find_targets, matches
from ...injection.walk import Place, Site
from ...kinds import LayerKind, Output
from ...kinds.output import Embedded
from ...layers.output import AdaptedOutput
from ...method import Column, Method, Slot
from .block import Kronecker, draw_rule, initialise, layer_norm, new_projection
from .config import PLACEMENTS, BottleneckConfig
from .families import FAMILIES
from .invertible import couple, embedding_sites, initialise_coupling, new_coupling, uncouple
from .running import add_change
from .sublayers import find_sublayers


class Bottleneck(Method, name="BOTTLENECK"):
    """h = y + s f(x); see the top of this file."""

    config = BottleneckConfig
    mergeable = False
    saves_embedding = False
    saved_buffers = ("adapter_rule", "adapter_down_rule", "adapter_up_rule")

    # ------------------------------------------------------------------ where

    def complete(self, config: BottleneckConfig, model: nn.Module) -> None:
        if config.placement is None and not config.target_modules:
            config.placement = "both"

    def sites(self, config: BottleneckConfig, model: nn.Module, known: Mapping[str, Place]) -> list[Site]:
        if config.target_modules:
            paths = [p for p in find_targets(known, config) if _block_of(p) not in config.leave_out]
            return [Site(known[p], _output_of(known[p], config)) for p in paths]
        found = find_sublayers(known)
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no block whose attention and feed-forward block could be told by their names "
                f"(known: {', '.join(family.name for family in FAMILIES)}); name modules with target_modules=[...], "
                "or describe the blocks with inlay.register_family(Family(...))"
            )
        blocks = 1 + max(f.block for f in found)
        _check_named_blocks(config, blocks)
        if beyond := [i for i in config.leave_out if i >= blocks]:
            raise ValueError(
                f"leave_out={beyond} names blocks that there are not: the model has {blocks}, from 0"
            )
        parts = PLACEMENTS[config.placement or "both"]
        behind = embedding_sites(config, model, known) if config.inv_adapter is not None else []
        return behind + [
            Site(f.exit, Output(f.exit.module, like=f.like, sublayer=f.sublayer, index=f.block))
            for f in found
            if f.part in parts
            and f.block not in config.leave_out
            and not matches(f.exit.path, config.exclude_modules)
        ]

    # ------------------------------------------------------------------ what

    def build(self, kind: LayerKind, config: BottleneckConfig, path: str) -> dict[str, Column]:
        assert isinstance(kind, Output)
        if isinstance(kind, Embedded):
            return new_coupling(kind, config, path)
        width, out = kind.in_features if config.parallel else kind.out_features, kind.out_features
        if config.original_ln_before and kind.in_features != out:
            raise ValueError(
                f"original_ln_before=True adds the input of {path} to its output, but they are {kind.in_features} and {out} wide"
            )
        size = _size(config, kind, path)
        where: dict[str, Any] = {"device": kind.device, "dtype": kind.dtype}
        columns: dict[str, Column] = {
            "adapter_down": new_projection(config, width, size, path, where),
            "adapter_up": new_projection(config, size, out, path, where),
        }
        if config.phm_layer:
            for name in (
                ("adapter_rule",) if config.shared_phm_rule else ("adapter_down_rule", "adapter_up_rule")
            ):
                rule = torch.empty([config.phm_dim] * 3, **where)
                columns[name] = nn.Parameter(rule) if config.learn_phm else rule
        if config.ln_before:
            columns["adapter_norm_before"] = nn.LayerNorm(width, **where)
        if config.ln_after:
            columns["adapter_norm_after"] = nn.LayerNorm(out, **where)
        if config.use_gating:
            columns["adapter_gate"] = nn.Linear(width, 1, **where)
        if isinstance(config.scaling, str):
            columns["adapter_scaling"] = nn.Parameter(
                torch.empty(out if config.scaling == "channel" else 1, **where)
            )
        else:
            columns["scaling"] = float(config.scaling)
        return columns

    def join(self, slots: Sequence[Slot]) -> None:
        behind = [slot for slot in slots if isinstance(slot.kind, Embedded)]
        for slot in behind[1:]:
            slot.shared = behind[0]
            for name in list(slot.columns):
                slot.layer.drop(name, slot)
        config: Any = slots[0].config
        if not config.phm_layer or not (config.shared_phm_rule or config.shared_W_phm):
            return
        first, *others = (slot for slot in slots if not isinstance(slot.kind, Embedded))
        for slot in others:
            slot.shared = first
            if config.shared_phm_rule:
                slot.layer.drop("adapter_rule", slot)
            for name in ("adapter_down", "adapter_up") if config.shared_W_phm else ():
                if _shapes(slot[name]) != _shapes(first[name]):
                    raise ValueError(
                        f"shared_W_phm=True needs layers of one size, but those of {slot.path} and {first.path} differ"
                    )
                slot[name].forget_factors()

    def init(self, slot: Slot) -> None:
        config: Any = slot.config
        start_at_zero = config.init_weights in ("lora", "mam_adapter")
        if isinstance(slot.kind, Embedded):
            initialise_coupling(slot, start_at_zero)
            return
        drawn = config.hypercomplex_nonlinearity if config.phm_layer else "glorot-uniform"
        initialise(slot["adapter_down"], config.init_weights, False, drawn)
        initialise(slot["adapter_up"], config.init_weights, start_at_zero, drawn)
        for name in self.saved_buffers:
            if name in slot.columns:
                draw_rule(
                    slot[name], config.phm_init_range if name == "adapter_rule" else 0.01, config.phm_c_init
                )
        if (gate := slot.get("adapter_gate")) is not None:
            start_gate(gate)
        if (scaling := slot.get("adapter_scaling")) is not None:
            nn.init.ones_(scaling)

    def unit_scale(self, slot: Slot) -> float:
        return float(cast("Any", slot.config).scaling)

    # ------------------------------------------------------------------ running

    def after(self, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        if y.shape[-1] != slot.kind.out_features:
            raise ValueError(
                f"the output of {slot.path} is {y.shape[-1]} wide, its adapter {slot.kind.out_features}; "
                "say the width with hidden_size"
            )
        if isinstance(slot.kind, Embedded):
            return couple(slot, y).to(y.dtype)
        h = self._parallel(slot, x, y) if cast("Any", slot.config).parallel else self._series(slot, x, y)
        return h.to(y.dtype)  # autocast normalises in float32

    def undo(self, slot: Slot, y: Tensor) -> Tensor:
        return uncouple(slot, y).to(y.dtype)

    def query(self, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        """Return what the bottleneck reads: y, the residual x, or what the model makes of both."""
        config: Any = slot.config
        if config.parallel or not config.original_ln_before:
            return x if config.parallel else y
        both, norm = cast("AdaptedOutput", slot.layer).with_residual(y, x), _model_norm(slot)
        return both if norm is None else cast("Tensor", norm(both))

    def change(self, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        config: Any = slot.config
        upon_y = config.parallel or config.residual_before_ln is True or not config.original_ln_before
        if not upon_y or not config.original_ln_after or config.adapter_residual_before_ln:
            return super().change(slot, x, y)
        if config.original_ln_before and not config.parallel:
            read, model_norm = cast("AdaptedOutput", slot.layer).with_residual(y, x), _model_norm(slot)
        else:
            read, model_norm = self.query(slot, x, y), None
        z, norm = add_change(slot, read, model_norm=model_norm), slot.get("adapter_norm_after")
        return (z if norm is None else layer_norm(norm, z)).to(y.dtype)

    def _parallel(self, slot: Slot, r: Tensor, y: Tensor) -> Tensor:
        return _go_on(slot, _with_change(slot, r, y), r)

    def _series(self, slot: Slot, r: Tensor, y: Tensor) -> Tensor:
        config: Any = slot.config
        x = carried = y
        model_norm, with_residual = None, False  # whether ``carried`` is y + r
        if config.original_ln_before:
            x = cast("AdaptedOutput", slot.layer).with_residual(y, r)
            model_norm = _model_norm(slot)
            if config.residual_before_ln == "post_add":
                carried, with_residual = x, True
            if config.residual_before_ln is False:
                if model_norm is not None:
                    x, model_norm = model_norm(x), None
                carried, with_residual = x, _model_norm(slot) is None
        if config.adapter_residual_before_ln:
            z = add_change(slot, x, model_norm=model_norm)
            return _go_on(slot, layer_norm(slot["adapter_norm_after"], z + carried), r)
        if with_residual and not config.original_ln_after and _model_norm(slot) is None:
            # The model adds r: leave it out here, instead of taking it off again.
            return _with_change(slot, x, y, model_norm)
        return _go_on(slot, _with_change(slot, x, carried, model_norm), r)


def _with_change(slot: Slot, x: Tensor, carried: Tensor, model_norm: nn.Module | None = None) -> Tensor:
    """Return ``carried + s f(x)``, normalised by the adapter itself before it is added where the configuration says so."""
    norm = slot.get("adapter_norm_after")
    if norm is None:
        return add_change(slot, x, carried, model_norm)
    return carried + layer_norm(norm, add_change(slot, x, model_norm=model_norm))


def _go_on(slot: Slot, h: Tensor, r: Tensor) -> Tensor:
    """Return what the module is to put out so that the model goes on as the configuration says."""
    if cast("Any", slot.config).original_ln_after:
        return h
    if _model_norm(slot) is None:
        return h - r
    cast("AdaptedOutput", slot.layer).pass_norm(h)
    return h


def _model_norm(slot: Slot) -> nn.Module | None:
    return cast("AdaptedOutput", slot.layer).norm()


def _size(config: BottleneckConfig, kind: Output, path: str) -> int:
    """Return the width of the bottleneck at a layer.

    Raises:
        ValueError: sizes are given by block, and this block has none.
    """
    given: Any = config.reduction_factor if config.bottleneck_size is None else config.bottleneck_size
    field = "reduction_factor" if config.bottleneck_size is None else "bottleneck_size"
    if isinstance(given, dict):
        number = given.get(str(kind.index), given.get("default"))
        if number is None:
            raise ValueError(f"{field} has no entry for block {kind.index} ({path}) and no 'default'")
        given = number
    return int(given) if field == "bottleneck_size" else max(1, int(kind.out_features // given))


def _check_named_blocks(config: BottleneckConfig, blocks: int) -> None:
    """Raise ValueError if sizes are given for blocks that the model does not have."""
    for name in ("reduction_factor", "bottleneck_size"):
        given = getattr(config, name)
        numbers = [key for key in given if key != "default"] if isinstance(given, dict) else []
        if beyond := [key for key in numbers if int(key) >= blocks]:
            raise ValueError(
                f"{name} names blocks {beyond} that there are not: the model has {blocks}, from 0"
            )


def _output_of(place: Place, config: BottleneckConfig) -> Output:
    return Output(place.module, width=config.hidden_size, index=_block_of(place.path))


def _block_of(path: str) -> int | None:
    """Return the first number in a module's path, by which lists of blocks are counted."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return None if found is None else int(found.group(1))


def _shapes(projection: Kronecker) -> list[torch.Size]:
    return [p.shape for p in projection.parameters()]
