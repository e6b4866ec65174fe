"""Running a bottleneck: what it adds to what is carried past it.

Where nothing else stands between the two projections and the sum, all of it is one autograd function
(``kernels/bottleneck.py``), a normalisation in front included; a compiler fuses the plain operations itself.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...blocks import open_gate
from ...kernels.autocast import autocast_is_on
from ...kernels.bottleneck import Narrow, Norm, bottleneck
from ...kernels.low_rank import any_gradient
from ...kernels.tracing import being_traced
from ...layers.taps import NormTap
from ...method import Slot
from .activations import DERIVATIVES, activation
from .block import Part, layer_norm, part_of


def add_change(
    slot: Slot, x: Tensor, carried: Tensor | None = None, model_norm: nn.Module | None = None
) -> Tensor:
    """Return ``carried + s f(norm(x))``, the change dropped out and gated; the change alone where nothing is carried.

    Args:
        slot: the adapter on a layer.
        x: what the adapter reads, ``[..., in]``.
        carried: ``[..., out]``.
        model_norm: the model's own normalisation, where x has yet to go through it.
    """
    down, up = _parts(slot, x)
    if model_norm is not None and not _is_plain_norm(model_norm):
        x, model_norm = model_norm(x), None
    if _fits(slot, x, carried, up):
        return _fused(slot, x, carried, model_norm, down, up)
    change = _change(slot, x if model_norm is None else model_norm(x), down, up)
    return change if carried is None else carried + change


def _fits(slot: Slot, x: Tensor, carried: Tensor | None, up: Part) -> bool:
    """Whether the fused function does all that there is to do."""
    config: Any = slot.config
    if config.scaling == "channel" and up.wide.shape[0] != slot.kind.out_features:
        return False  # rows of Kronecker factors stand for several channels each
    dropping = slot.layer.training and (config.dropout or config.stochastic_depth)
    if dropping or config.use_gating or being_traced() or autocast_is_on(x):
        return False
    return carried is None or (carried.dtype == x.dtype and carried.shape[:-1] == x.shape[:-1])


def _fused(
    slot: Slot, x: Tensor, carried: Tensor | None, model_norm: nn.Module | None, down: Part, up: Part
) -> Tensor:
    own_norm: Any = slot.get("adapter_norm_before")
    if own_norm is not None and model_norm is not None:
        x, model_norm = model_norm(x), None
    norm: Any = own_norm if own_norm is not None else model_norm
    gain, scaling = slot.get("scaling"), slot.get("adapter_scaling")
    wide, bias = up.wide, up.bias
    if scaling is not None:
        wide = wide * (scaling if len(scaling) == 1 else scaling[:, None])
        bias = None if bias is None else bias * scaling
    return bottleneck(
        x,
        carried,
        down.wide,
        down.bias,
        _narrow(slot.config.non_linearity, down, up),  # type: ignore[attr-defined]
        wide,
        bias,
        1.0 if gain is None else gain,
        None if norm is None else Norm(norm.weight, norm.bias, norm.eps),
    )


def _narrow(name: str, down: Part, up: Part) -> Narrow:
    act = activation(name)
    if down.mix is None and up.mix is None:
        return Narrow(act, derivative=DERIVATIVES.get(name))
    names = [(part, field) for part in (down, up) for field in ("mix", "mix_bias")]
    present = [getattr(part, field) for part, field in names]

    def run(s: Tensor, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        mix, bias, back, _ = (None if t is None else next(given) for t in present)
        a = act(s if mix is None else F.linear(s, mix.T, bias))
        return a if back is None else a @ back

    return Narrow(run, tuple(t for t in present if t is not None))


def _change(slot: Slot, x: Tensor, down: Part, up: Part) -> Tensor:
    """Return ``s f(x)``, dropped out and gated, by plain operations."""
    config: Any = slot.config
    norm, gate, given = slot.get("adapter_norm_before"), slot.get("adapter_gate"), x
    if norm is not None:
        x = layer_norm(norm, x)
    z = up.up(activation(config.non_linearity)(down.down(x)))
    scaling = slot.get("adapter_scaling")
    if scaling is not None:
        z = z * scaling.to(z.dtype)
    elif slot["scaling"] != 1.0:
        z = z * slot["scaling"]
    if slot.layer.training and config.dropout:
        z = F.dropout(z, config.dropout)
    if gate is not None:
        z = z * open_gate(gate, given)
    if slot.layer.training and config.stochastic_depth:
        kept = torch.empty(z.shape[0], *[1] * (z.dim() - 1), device=z.device, dtype=z.dtype)
        z = z * kept.bernoulli_(1 - config.stochastic_depth) / (1 - config.stochastic_depth)
    return z


def _parts(slot: Slot, x: Tensor) -> tuple[Part, Part]:
    """Return the two projections; what layers share is kept by another slot."""
    config: Any = slot.config
    if not config.phm_layer:
        return (
            part_of(slot["adapter_down"], True, None, slot["adapter_down"], x),
            part_of(slot["adapter_up"], False, None, slot["adapter_up"], x),
        )
    return _kronecker_part(slot, "adapter_down", x), _kronecker_part(slot, "adapter_up", x)


def _kronecker_part(slot: Slot, name: str, x: Tensor) -> Part:
    """Return a projection made of Kronecker products; where none of them gets a gradient, it is formed once."""
    config, keeper, projection = cast("Any", slot.config), slot.shared or slot, slot[name]
    rule = keeper["adapter_rule"] if config.shared_phm_rule else slot[f"{name}_rule"]
    factors = keeper[name] if config.shared_W_phm else projection
    made_from = [rule, *factors.parameters(), *projection.parameters()]

    def make() -> Part:
        return part_of(projection, name == "adapter_down", rule, factors, x)

    return make() if any_gradient(*made_from) else slot.kept(name, made_from, make, x.device)


def _is_plain_norm(norm: nn.Module) -> bool:
    """Whether a module is PyTorch's layer normalisation over the last axis, with no hooks but ours."""
    if type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1 or "forward" in norm.__dict__:
        return False
    others = (norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks)
    return not any(others) and all(isinstance(hook, NormTap) for hook in norm._forward_hooks.values())
