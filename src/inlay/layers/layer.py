"""The one wrapper: it stands where an adapted layer stood, and computes what its adapters make of it.

What each adapter does is up to its ``Method``; where adapters and their parameters are kept is in ``slots.py``. Adapters
that are on are applied by the fastest path that they all have:

    values in the weight            base_layer(x)                        as it is; see in_weight.py
    one adapter, plain layer        method.fused(x)                      base product and delta in one function
    additive adapters               after(x, base_layer(before(x)))      deltas are added to the output
    anything else                   base_layer with merge(W, b)          right by definition
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..composition.on_layers import run_composed
from ..composition.parts import only_adds
from ..composition.rows import groups_of
from ..composition.weights import composed_tensors
from ..config import PeftConfig
from ..kernels.autocast import outside_autocast
from ..kinds import LayerKind
from ..method import Method, Slot
from ..stores import store_of
from ..switch import BASE, Switch
from .in_weight import InWeight
from .slots import SlottedLayer


class AdaptedLayer(SlottedLayer):
    """A frozen layer and the adapters on it.

    Args:
        base_layer: the layer that is adapted (or an ``AdaptedLayer`` of another parameter of the same module).
        kind: its geometry.
        switch: the model's switch.
        read_through: whether the parent reads ``weight`` instead of calling the layer; ``weight`` is then the adapted one.
    """

    def __init__(
        self, base_layer: nn.Module, kind: LayerKind, switch: Switch, read_through: bool = False
    ) -> None:
        super().__init__(base_layer, kind, switch)
        self.read_through = read_through
        self.store = store_of(base_layer, kind.param)
        self.originals: dict[str, nn.Parameter] = {}  # base parameters that merging replaced
        self.inside: InWeight | None = None  # values that stand in the base weight itself
        self.train(base_layer.training)

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer with the adapters that the switch has on."""
        setting = self.setting()
        if setting.route is not None and setting.enabled:
            return self._run_mixed(setting.route, x, *args, **kwargs)
        if self.merged_adapters and not setting.enabled:
            return self._run_with(self.originals, x, *args, **kwargs)
        slots = self.live_slots(setting)
        if setting.composition is not None and slots:
            return run_composed(self, setting.composition, x, *args, **kwargs)
        if slots or self.inside is not None:
            return self._run(slots, x, *args, **kwargs)
        return self.base_layer(x, *args, **kwargs)

    def _run(self, slots: Sequence[Slot], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.inside is not None:
            return self.inside.run(slots, x, *args, **kwargs)
        return self._run_beside(slots, x, *args, **kwargs)

    def _run_beside(self, slots: Sequence[Slot], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer where its weight is the base weight."""
        if not slots:
            return self.base_layer(x, *args, **kwargs)
        if not self.kind.direct or not _compose_on_activations(slots):
            return self._run_merged(slots, x, *args, **kwargs)
        first, rest = slots[0], slots[1:]
        y = first.method.fused(first, x) if self._is_bare() and not args and not kwargs else None
        if y is None:
            inner = x
            for slot in reversed(slots):
                inner = slot.method.before(slot, inner)
            y, rest = self.base_layer(inner, *args, **kwargs), slots
        for slot in rest:
            y = slot.method.after(slot, x, y)
        return y

    def _is_bare(self) -> bool:
        """Whether calling the base layer is its plain product and nothing else: no hooks, no forward of its own."""
        layer = self.base_layer
        hooked = (
            layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
        )
        return self.kind.standard and self.store.plain and not hooked and "forward" not in layer.__dict__

    def _run_merged(self, slots: Sequence[Slot], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.check_mergeable(slots)
        return self._run_with(self.adapted_tensors(slots), x, *args, **kwargs)

    def check_mergeable(self, slots: Sequence[Slot]) -> None:
        """Raise ValueError where an adapter does something right now that merged weights cannot express."""
        for slot in slots:
            if reason := slot.method.beyond_merge(slot):
                raise ValueError(
                    f"adapter {slot.name!r} cannot use {reason} here, where it runs through merged weights"
                )

    def _run_with(self, tensors: dict[str, Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the base layer with other weights, leaving it untouched."""
        if self.kind.direct and (self._is_bare() or not self.store.plain):
            w, b = tensors[self.kind.param], tensors.get(self.kind.bias, self.base_bias())
            return self.kind.apply(x, self.kind.matrix(w), b)
        prefix = "base_layer." * _depth(self.base_layer)
        return functional_call(
            self.base_layer, {prefix + key: value for key, value in tensors.items()}, (x, *args), kwargs
        )

    def _run_mixed(self, route: tuple[str, ...], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run each sample through its own adapter."""
        if not self.kind.by_rows or args or kwargs:
            raise ValueError(
                f"adapter_names is not supported on {type(self.base_layer).__name__} layers; run one adapter at a time"
            )
        groups = groups_of(route, self.slots, len(x), "a layer")
        slots = {name: self.slots[name] for name in groups.names if name != BASE}

        def alone(name: str, x: Tensor) -> Tensor:
            return self._run([slots[name]] if name in slots else [], x)  # type: ignore[no-any-return]

        def upon(name: str, x: Tensor, y: Tensor) -> Tensor:
            return slots[name].method.after(slots[name], x, y) if name in slots else y

        if len(groups.names) == 1 or not all(only_adds(slot) for slot in slots.values()):
            return groups.run(alone, x)
        return groups.run(upon, x, self._run([], x))  # one base product for all

    # ------------------------------------------------------------------ adapters in the weight

    def add(self, name: str, method: Method, config: PeftConfig, path: str) -> Slot:
        slot = super().add(name, method, config, path)
        if method.in_weight and self.inside is None:
            self.inside = InWeight(self)
            self.register_load_state_dict_post_hook(_adopt_loaded)  # type: ignore[no-untyped-call]
        return slot

    def remove(self, name: str) -> None:
        if self.inside is not None:
            self.inside.leave()
        super().remove(name)
        if not any(slot.method.in_weight for slot in self.slots.values()):
            self.inside = None

    def train(self, mode: bool = True) -> AdaptedLayer:
        """Set training or evaluation mode; values are looked at anew afterwards."""
        super().train(mode)
        if self.inside is not None:
            self.inside.stale = True
        return self

    # ------------------------------------------------------------------ the base layer

    def base_matrix(self) -> Tensor:
        """Return the base weight as the canonical matrix W[..., out, in]."""
        if self.inside is not None:
            return self.kind.matrix(self.inside.base())
        return self.kind.matrix(self.store.read(self.host, self.kind.param))

    def set_base_matrix(self, w: Tensor, name: str) -> None:
        """Give the base layer another weight for good, as a canonical matrix.

        A layer tied to it keeps the present one, unless the adapter is to be tied as well.

        Args:
            w: the weight W[..., out, in]; it is stored in the present one's dtype and format.
            name: the adapter that asks for it, which must be the only one on the layer.

        Raises:
            ValueError: other adapters were made for the present weight, or are merged into it.
        """
        if others := sorted(self.slots.keys() - {name}):
            raise ValueError(
                f"adapter {name!r} starts by changing the base weights, which adapters {others} were made for; "
                "give it a model of its own, or convert it with "
                "save_pretrained(path_initial_model_for_weight_conversion=...) and load the result"
            )
        new = self.store.wrap(self.host, self.kind.param, self.kind.native(w).contiguous())
        if getattr(self.slots[name].config, "ensure_weight_tying", False):
            getattr(self.host, self.kind.param).data = new.data
        else:
            self._install(self.kind.param, new)

    def base_bias(self) -> Tensor | None:
        """Return the base bias b[out], or None."""
        bias = getattr(self.host, self.kind.bias, None) if self.kind.bias else None
        return bias if isinstance(bias, Tensor) else None

    @property
    def weight(self) -> Tensor:
        """The base layer's weight (of a layer that is only read, never called: the adapted weight)."""
        weight: Tensor = self._seen("weight")
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        bias: Tensor | None = self._seen("bias")
        return bias

    def _seen(self, name: str) -> Any:
        present = getattr(self.base_layer, name)
        if not self.read_through:
            return present
        setting = self.setting()
        if self.merged_adapters:
            return present if setting.enabled else self.originals.get(name, present)
        if setting.route is not None and setting.enabled and self.slots:
            raise ValueError(
                f"adapter_names is not supported on {type(self.host).__name__} layers whose weight is read, not called"
            )
        slots = self.live_slots(setting)
        if setting.composition is not None and slots:
            return composed_tensors(self, setting.composition).get(name, present)
        if self.inside is not None and name == self.kind.param and (w := self.inside.read(slots)) is not None:
            return w
        return self.adapted_tensors(slots).get(name, present) if slots else present

    # ------------------------------------------------------------------ merging

    @property
    def merged(self) -> bool:
        """Whether the base layer holds merged weights."""
        return bool(self.merged_adapters)

    def adapted_tensors(self, slots: Sequence[Slot]) -> dict[str, Tensor]:
        """Return the base layer's parameters as these adapters, in this order, would have them."""

        def in_order(w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
            for slot in slots:
                w, b = slot.method.merge(slot, w, b)
            return w, b

        return self.merged_tensors(in_order)

    def merged_tensors(
        self, merge: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
    ) -> dict[str, Tensor]:
        """Return the base layer's parameters as ``merge(W[..., out, in], b)`` makes them.

        Half precision is merged in float32 and rounded once.
        """
        w, b = self.base_matrix(), self.base_bias()
        exact = torch.promote_types(w.dtype, torch.float32)
        with outside_autocast(w):
            merged_w, merged_b = merge(w.to(exact), b if b is None else b.to(exact))
        tensors = {self.kind.param: self.kind.native(merged_w).to(w.dtype)}
        if merged_b is not None:
            tensors[self.kind.bias] = merged_b.to(w.dtype if b is None else b.dtype)
        return tensors

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Write adapters into the base layer; the replaced parameters are kept, so that ``unmerge`` is exact.

        Args:
            safe_merge: refuse weights that are not finite, leaving the layer as it was.
            adapter_names: which adapters, in order; the active ones by default.

        Raises:
            ValueError: ``safe_merge`` found weights that are not finite.
        """
        if self.inside is not None:
            self.inside.leave()
        setting = self.setting()
        names = setting.active if adapter_names is None else adapter_names
        tree = setting.composition if adapter_names is None else None
        slots = [self.slots[n] for n in names if n in self.slots and n not in self.merged_adapters]
        if not slots:
            return
        for slot in slots:
            if slot.owner is not None:  # first, so that the tied weight can be shared again
                slot.owner.layer.merge(safe_merge, names if tree is None else None)
        tensors = self.adapted_tensors(slots) if tree is None else composed_tensors(self, tree)
        if safe_merge and not all(bool(t.isfinite().all()) for t in tensors.values()):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {slots[-1].name} seems to be broken"
            )
        for key, value in tensors.items():
            self.originals.setdefault(key, getattr(self.host, key))
            self._install(key, self._parameter_for(key, value, slots))
        self.merged_adapters += [slot.name for slot in slots]
        self.merged_composition = tree

    def _parameter_for(self, key: str, value: Tensor, slots: Sequence[Slot]) -> nn.Parameter:
        if key != self.kind.param:
            return nn.Parameter(value, requires_grad=False)
        owners = [slot.owner for slot in slots]
        first = owners[0]
        if first is not None and all(o is not None and o.name in o.layer.merged_adapters for o in owners):
            tied: nn.Parameter = getattr(first.layer.host, first.kind.param)
            return tied
        return self.store.wrap(self.host, key, value)

    def unmerge(self) -> None:
        """Put the base layer's own parameters back, bit for bit."""
        if self.inside is not None:
            self.inside.leave()
        for key, parameter in self.originals.items():
            self._install(key, parameter)
        self.originals, self.merged_adapters, self.merged_composition = {}, [], None

    def _install(self, key: str, parameter: nn.Parameter) -> None:
        if key == self.kind.param:
            self.kind.adjust(self.host, parameter)
        setattr(self.host, key, parameter)
        if self.inside is not None and key == self.kind.param:
            self.inside.adopt()

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what an adapter adds to the base weight, in the layer's own layout and in at least float32.

        Raises:
            ValueError: the adapter does not sit on this layer.
        """
        if adapter not in self.slots:
            raise ValueError(f"Adapter {adapter} not found on this layer. There are: {sorted(self.slots)}")
        slot = self.slots[adapter]
        return self.kind.native(slot.method.delta(slot))

    # ------------------------------------------------------------------ what the rest of PyTorch does to modules

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLayer:
        if self.inside is not None:
            self.inside.leave()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.kind.follow(self.host)
        if self.inside is not None and not self.merged_adapters:
            self.inside.adopt()
        for name, p in self.originals.items():
            self.originals[name] = p if p is None else nn.Parameter(fn(p.data), requires_grad=p.requires_grad)
        for slot in self.slots.values():
            slot.cache.clear()
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.inside is not None:  # the base layer saves its weight after this
            self.inside.withdraw()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.inside is not None:
            self.inside.leave()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        if self.inside is not None:
            self.inside.leave()
        return self.__dict__.copy()


def _adopt_loaded(layer: AdaptedLayer, _: Any) -> None:
    """After loading a state: ``assign=True`` has put another parameter into the base layer."""
    if layer.inside is not None and not layer.merged_adapters:
        layer.inside.adopt()


def _depth(layer: nn.Module) -> int:
    depth = 0
    while isinstance(layer, AdaptedLayer):
        layer, depth = layer.base_layer, depth + 1
    return depth


def _compose_on_activations(slots: Sequence[Slot]) -> bool:
    return all(s.method.works_on_activations() for s in slots) and (
        len(slots) == 1 or all(s.method.additive for s in slots)
    )
