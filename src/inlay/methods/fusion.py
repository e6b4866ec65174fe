"""AdapterFusion: mix what several trained adapters do, token by token. Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247.

    w_i = softmax_i((W_q y + b_q) . (W_k u_i))        y[..., out]: the layer's output without the members
    y'  = y + W_v sum_i w_i u_i                       u_i[..., out]: what member i adds to y;  W_q, W_k, W_v [out, out]

W_v starts as the identity, W_q and W_k as small random numbers, so a fusion starts close to the plain average of its members (and
not as the identity). A penalty ``regularization * ||I - W_v||^2`` keeps W_v near its start. There is no 1/sqrt(out).

Two things are simpler than in the authors' code, and the same function. The keys have no bias, which would add q . b_k to all
scores alike, and a softmax does not see that. And neither keys nor values are formed for each member:
q . (W_k u_i) = (W_k^T q) . u_i, and W_v is applied to the sum, so n members cost as many products as one (with many tokens,
one product for W_k^T W_q, too). W_v starts as exactly
the identity; the authors' code adds 1e-6 off the diagonal.
Authors' code: https://github.com/adapter-hub/adapters
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..composition import check_members
from ..config import PeftConfig, PeftType
from ..injection.walk import Place, Site
from ..kernels.autocast import autocast_is_on
from ..kinds import Embedding, LayerKind, Linear, Norm, Output
from ..kinds.base import uninitialised
from ..kinds.output import Embedded
from ..layers.extras import TrainableTokensWrapper
from ..layers.layer import AdaptedLayer
from ..method import Column, Method, Slot


@dataclass(kw_only=True)
class FusionConfig(PeftConfig):
    """Configuration of a fusion of adapters that the model has already.

    It sits on every layer on which two or more of its members sit; where there is one, that one acts as it is.

    Args:
        members: names of the adapters to mix, two or more.
        train_members: train the members together with the fusion; otherwise they stay as they are.
        regularization: weight of the penalty ``||I - W_v||^2`` summed over layers, which is added to the loss in training.
        temperature: what the scores are divided by.
        modules_to_save: modules that are trained and saved whole, such as a head for the new task.

    Raises:
        ValueError: fewer than two members, or a number out of its range.
    """

    peft_type: PeftType | str | None = PeftType.FUSION
    members: list[str] = field(default_factory=list)
    target_modules: ClassVar[None] = None  # the layers follow from the members
    train_members: bool = False
    regularization: float = 0.01
    temperature: float = 1.0
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.members, str):
            raise ValueError(
                f"members={self.members!r} must be a list of adapters' names, such as ['a', 'b']"
            )
        self.members = list(self.members)
        check_members(self.members)
        if self.regularization < 0:
            raise ValueError(f"regularization={self.regularization} must be 0 or more")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")


class Fusion(Method, name="FUSION"):
    """y' = y + W_v sum_i w_i u_i; see the top of this file."""

    config = FusionConfig
    mixes = True
    mergeable = False

    def complete(self, config: FusionConfig, model: nn.Module) -> None:
        """Leave the configuration as it is: ``sites`` finds the layers."""

    def sites(self, config: FusionConfig, model: nn.Module, known: Mapping[str, Place]) -> list[Site]:
        return _meeting_places(known, config.members)

    def build(self, kind: LayerKind, config: FusionConfig, path: str) -> dict[str, Column]:
        if not isinstance(kind, (Linear, Embedding, Norm, Output)) or getattr(kind, "of_batches", False):
            raise ValueError(
                f"a fusion needs layers whose features come last; its members {config.members} meet on {path}, which is none"
            )
        if isinstance(kind, Embedded):
            raise ValueError(
                f"members {config.members} are invertible adapters at {path}, and a mixture of such has no inverse; fuse "
                "adapters without inv_adapter"
            )
        where: dict[str, Any] = {"device": kind.device, "dtype": kind.dtype}
        size = kind.out_features
        return {
            "fusion_query": uninitialised(nn.Linear, size, size, **where),
            "fusion_key": uninitialised(nn.Linear, size, size, bias=False, **where),
            "fusion_value": uninitialised(nn.Linear, size, size, bias=False, **where),
        }

    @torch.no_grad()
    def init(self, slot: Slot) -> None:
        query, key = slot["fusion_query"], slot["fusion_key"]
        nn.init.normal_(query.weight, std=0.02)
        nn.init.zeros_(query.bias)
        nn.init.normal_(key.weight, std=0.02)
        nn.init.eye_(slot["fusion_value"].weight)

    def mix(self, slot: Slot, query: Tensor, changes: Sequence[Tensor]) -> Tensor:
        """Return ``W_v sum_i w_i u_i`` for a query and what the members change, all ``[..., out]``."""
        config: Any = slot.config
        to_query, to_key, to_value = (slot[f"fusion_{part}"] for part in ("query", "key", "value"))
        dtype = changes[0].dtype
        asked = _asked(query.to(dtype), to_query.weight, to_query.bias, to_key.weight)
        exact = torch.promote_types(dtype, torch.float32)
        scores = torch.stack([(asked * u).sum(-1, dtype=exact) for u in changes], -1)
        shares = (scores / config.temperature).softmax(-1).to(dtype)
        mixed = changes[0] * shares[..., 0, None]
        for i, u in enumerate(changes[1:], start=1):
            mixed = torch.addcmul(mixed, u, shares[..., i, None])
        return F.linear(mixed, to_value.weight.to(dtype))

    def penalty(self, slots: Sequence[Slot]) -> Tensor | None:
        weights = [slot["fusion_value"].weight for slot in slots]
        rate = slots[0].config.regularization  # type: ignore[attr-defined]
        if not rate:
            return None
        far = [(torch.eye(len(w), device=w.device, dtype=w.dtype) - w).square().sum() for w in weights]
        total: Tensor = rate * torch.stack([term.to(far[0].device) for term in far]).sum()
        return total


def _asked(query: Tensor, to_query: Tensor, bias: Tensor, to_key: Tensor) -> Tensor:
    """Return ``W_k^T (W_q y + b_q)`` for ``y[..., out]``.

    Where there are more tokens than features, ``W_k^T W_q`` is formed first: one product of that size instead of two, and one
    tensor less that is kept for the backward pass.
    """
    if query.numel() <= to_query.numel() or autocast_is_on(query):
        to_query, bias, to_key = (t.to(query.dtype) for t in (to_query, bias, to_key))
        return F.linear(query, to_query, bias) @ to_key
    return F.linear(query, (to_key.T @ to_query).to(query.dtype), (bias @ to_key).to(query.dtype))


def _meeting_places(known: Mapping[str, Place], members: Sequence[str]) -> list[Site]:
    """Return the layers on which two or more members sit.

    Raises:
        ValueError: a member is not there or is a fusion itself, or members meet nowhere, or where they cannot be mixed.
    """
    layers = [(place, layer) for place in known.values() for layer in _adapted(place)]
    methods = {name: slot.method for _, layer in layers for name, slot in layer.slots.items()}
    for name in members:
        if name not in methods:
            raise ValueError(
                f"the fusion's member {name!r} is not loaded (there are {sorted(methods)}); load it first"
            )
        if methods[name].mixes:
            raise ValueError(f"the fusion's member {name!r} is a fusion itself; name its members instead")
    found = [Site(p, layer.kind) for p, layer in layers if sum(name in layer.slots for name in members) > 1]
    for place, _ in found:
        if isinstance(place.wrapper, TrainableTokensWrapper):
            raise ValueError(
                f"members {list(members)} train single tokens of {place.path}, which cannot be mixed"
            )
    if not found:
        raise ValueError(
            f"the adapters {list(members)} sit on no layer together, so there is nothing to fuse"
        )
    return found


def _adapted(place: Place) -> Iterator[AdaptedLayer]:
    layer: Any = place.wrapper
    if isinstance(layer, TrainableTokensWrapper):
        layer = layer.token_adapter
    while isinstance(layer, AdaptedLayer):
        yield layer
        layer = layer.base_layer
