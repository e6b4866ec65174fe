"""The one wrapper: it stands where an adapted layer stood.

    AdaptedLayer                     in memory (the keys of PEFT)
    |- base_layer                    ...query.base_layer.weight
    |- lora_A   {adapter: module}    ...query.lora_A.default.weight      a column
    |- lora_B   {adapter: module}    ...query.lora_B.default.weight      a column
    |- scaling  {adapter: number}                                        a column of plain numbers
    |- slots    {adapter: Slot}      one adapter's view across the columns
    `- switch                        which adapters are on; shared by the whole model

Columns are modules or parameters of the layer itself, so that optimisers, checkpoints, FSDP2 and ``.to()`` see ordinary
PyTorch. What the layer computes is up to each adapter's ``Method``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .config import PeftConfig
from .kinds import LayerKind
from .layer_verbs import LayerVerbs
from .method import Method, Slot
from .stores import store_of
from .switch import BASE, Setting, Switch


class AdaptedLayer(LayerVerbs, nn.Module):
    """A frozen layer and the adapters on it.

    Args:
        base_layer: the layer that is adapted (or an ``AdaptedLayer`` of another parameter of the same module).
        kind: its geometry.
        switch: the model's switch.
        read_through: whether the parent reads ``weight`` instead of calling the layer; ``weight`` is then the adapted one.
    """

    def __init__(self, base_layer: nn.Module, kind: LayerKind, switch: Switch, read_through: bool = False) -> None:
        super().__init__()
        self.base_layer, self.kind, self.switch, self.read_through = base_layer, kind, switch, read_through
        self.store = store_of(base_layer, kind.param)
        self.slots: dict[str, Slot] = {}
        self.merged_adapters: list[str] = []
        self.originals: dict[str, nn.Parameter] = {}  # base parameters that merging replaced
        self.apart: tuple[int, dict[str, Any]] = (-1, {})  # changes to this layer alone, and the switch's epoch they belong to
        self.train(base_layer.training)

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer with the adapters that the switch has on."""
        setting = self.setting()
        if setting.route is not None and setting.enabled:
            return self._run_mixed(setting.route, x, *args, **kwargs)
        if self.merged_adapters and not setting.enabled:
            return self._run_with(self.originals, x, *args, **kwargs)
        slots = self._live_slots(setting)
        return self._run(slots, x, *args, **kwargs) if slots else self.base_layer(x, *args, **kwargs)

    def setting(self) -> Setting:
        """Return the setting that holds for this layer in this thread."""
        setting = self.switch.now()
        epoch, changes = self.apart
        return replace(setting, **changes) if epoch == self.switch.epoch else setting

    def _live_slots(self, setting: Setting) -> list[Slot]:
        if not setting.enabled or self.merged_adapters:
            return []
        return [self.slots[name] for name in setting.active if name in self.slots]

    def _run(self, slots: Sequence[Slot], x: Tensor, *args: Any, **kwargs: Any) -> Any:
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
        hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
        return self.kind.standard and self.store.plain and not hooked and "forward" not in layer.__dict__

    def _run_merged(self, slots: Sequence[Slot], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        for slot in slots:
            if reason := slot.method.beyond_merge(slot):
                raise ValueError(f"adapter {slot.name!r} cannot use {reason} here, where it runs through merged weights")
        return self._run_with(self.adapted_tensors(slots), x, *args, **kwargs)

    def _run_with(self, tensors: dict[str, Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the base layer with other weights, leaving it untouched."""
        if self.kind.direct and (self.kind.standard or not self.store.plain):
            w, b = tensors[self.kind.param], tensors.get(self.kind.bias, self.base_bias())
            return self.kind.apply(x, self.kind.matrix(w), b)
        prefix = "base_layer." * _depth(self.base_layer)
        return functional_call(self.base_layer, {prefix + key: value for key, value in tensors.items()}, (x, *args), kwargs)

    def _run_mixed(self, route: tuple[str, ...], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run each sample through its own adapter. Rows of one sample stay together, as in ``[batch * beams, ...]``."""
        if not self.kind.direct or args or kwargs:
            raise ValueError(f"adapter_names is not supported on {type(self.base_layer).__name__} layers; run one adapter at a time")
        if x.shape[0] % len(route):
            raise ValueError(f"adapter_names has {len(route)} entries but a layer received {x.shape[0]} rows, not a multiple of it")
        repeats = x.shape[0] // len(route)
        names = [name if name in self.slots else BASE for name in route for _ in range(repeats)]
        order = sorted(range(len(names)), key=names.__getitem__)
        parts, start = [], 0
        permutation = torch.tensor(order, device=x.device)
        rows = x.index_select(0, permutation)
        for name in sorted(set(names)):
            part = rows[start : start + names.count(name)]
            parts.append(self.base_layer(part) if name == BASE else self._run([self.slots[name]], part))
            start += len(part)
        return torch.cat(parts).index_select(0, permutation.argsort())

    # ------------------------------------------------------------------ the base layer

    def base_matrix(self) -> Tensor:
        """Return the base weight as the canonical matrix W[..., out, in]."""
        return self.kind.matrix(self.store.read(self.host, self.kind.param))

    def set_base_matrix(self, w: Tensor, name: str) -> None:
        """Give the base layer another weight for good, as a canonical matrix. A layer tied to it keeps the present one.

        Args:
            w: the weight W[..., out, in]; it is stored in the present one's dtype and format.
            name: the adapter that asks for it, which must be the only one on the layer.

        Raises:
            ValueError: other adapters were made for the present weight, or are merged into it.
        """
        if others := sorted(self.slots.keys() - {name}):
            raise ValueError(
                f"adapter {name!r} starts by changing the base weights, which adapters {others} were made for; give it a model of its "
                "own, or convert it with save_pretrained(path_initial_model_for_weight_conversion=...) and load the result"
            )
        self._install(self.kind.param, self.store.wrap(self.host, self.kind.param, self.kind.native(w).contiguous()))

    def base_bias(self) -> Tensor | None:
        """Return the base bias b[out], or None."""
        bias = getattr(self.host, self.kind.bias, None) if self.kind.bias else None
        return bias if isinstance(bias, Tensor) else None

    @property
    def host(self) -> nn.Module:
        """The module that owns the adapted parameter."""
        return self.get_base_layer()

    def get_base_layer(self) -> nn.Module:
        """Return the layer as it was before any adapter."""
        layer = self.base_layer
        while isinstance(layer, AdaptedLayer):
            layer = layer.base_layer
        return layer

    @property
    def weight(self) -> Tensor:
        """The base layer's weight (of a layer that is only read, never called: the adapted weight)."""
        return self._seen("weight")

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self._seen("bias")

    def _seen(self, name: str) -> Any:
        present = getattr(self.base_layer, name)
        if not self.read_through:
            return present
        setting = self.setting()
        if self.merged_adapters:
            return present if setting.enabled else self.originals.get(name, present)
        if setting.route is not None and setting.enabled and self.slots:
            raise ValueError(f"adapter_names is not supported on {type(self.host).__name__} layers whose weight is read, not called")
        slots = self._live_slots(setting)
        return self.adapted_tensors(slots).get(name, present) if slots else present

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    # ------------------------------------------------------------------ adapters

    def column(self, name: str) -> Any:
        """Return a column, the dictionary of one part over all adapters."""
        module = self._modules.get(name)
        return module if module is not None else self.__dict__[name]

    def add(self, name: str, method: Method, config: PeftConfig, path: str) -> Slot:
        """Build an adapter's columns. Nothing is changed if the method refuses.

        Raises:
            ValueError: the name is taken, the method refuses the layer, or another method uses a column in another way.
        """
        if name in self.slots:
            raise ValueError(f"Adapter with name {name!r} already exists on layer {path}.")
        columns = method.build(self.kind, config, path)
        for column, entry in columns.items():
            present = self._modules.get(column)
            if present is not None and not isinstance(present, _column_type(entry)):
                raise ValueError(f"adapter {name!r} cannot share layer {path} with an adapter that keeps {column!r} in another form")
        slot = Slot(self, name, method, config)
        for column, entry in columns.items():
            if column not in self._modules and column not in self.__dict__:
                setattr(self, column, _column_type(entry)())
            self.column(column)[name] = entry
            slot.columns.append(column)
            if isinstance(entry, nn.Module):
                entry.train(self.training)
        self.slots[name] = slot
        return slot

    def remove(self, name: str) -> None:
        """Drop an adapter and every column that held nothing else."""
        slot = self.slots.pop(name)
        for column in slot.columns:
            del self.column(column)[name]
            if not len(self.column(column)):
                delattr(self, column)

    # ------------------------------------------------------------------ merging

    @property
    def merged(self) -> bool:
        """Whether the base layer holds merged weights."""
        return bool(self.merged_adapters)

    def adapted_tensors(self, slots: Sequence[Slot]) -> dict[str, Tensor]:
        """Return the base layer's parameters as these adapters, in this order, would have them.

        Half precision is merged in float32 and rounded once.
        """
        w, b = self.base_matrix(), self.base_bias()
        exact = torch.promote_types(w.dtype, torch.float32)
        merged_w, merged_b = w.to(exact), b if b is None else b.to(exact)
        with torch.autocast(w.device.type, enabled=False):
            for slot in slots:
                merged_w, merged_b = slot.method.merge(slot, merged_w, merged_b)
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
        names = self.setting().active if adapter_names is None else adapter_names
        slots = [self.slots[n] for n in names if n in self.slots and n not in self.merged_adapters]
        if not slots:
            return
        tensors = self.adapted_tensors(slots)
        if safe_merge and not all(bool(t.isfinite().all()) for t in tensors.values()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {slots[-1].name} seems to be broken")
        for key, value in tensors.items():
            self.originals.setdefault(key, getattr(self.host, key))
            self._install(key, self._parameter_for(key, value, slots))
        self.merged_adapters += [slot.name for slot in slots]

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
        for key, parameter in self.originals.items():
            self._install(key, parameter)
        self.originals, self.merged_adapters = {}, []

    def _install(self, key: str, parameter: nn.Parameter) -> None:
        if key == self.kind.param:
            self.kind.adjust(self.host, parameter)
        setattr(self.host, key, parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLayer:
        super()._apply(fn, recurse)
        for name, p in self.originals.items():
            self.originals[name] = p if p is None else nn.Parameter(fn(p.data), requires_grad=p.requires_grad)
        for slot in self.slots.values():
            slot.cache.clear()
        return self


def _depth(layer: nn.Module) -> int:
    depth = 0
    while isinstance(layer, AdaptedLayer):
        layer, depth = layer.base_layer, depth + 1
    return depth


def _compose_on_activations(slots: Sequence[Slot]) -> bool:
    return all(s.method.works_on_activations() for s in slots) and (len(slots) == 1 or all(s.method.additive for s in slots))


def _column_type(entry: Any) -> type:
    return nn.ModuleDict if isinstance(entry, nn.Module) else nn.ParameterDict if isinstance(entry, nn.Parameter) else dict
