"""A layer with slots for adapters: which sit on it, where their parameters are, and which of them are on.

    AdaptedLayer                     in memory (the keys of PEFT)
    |- base_layer                    ...query.base_layer.weight
    |- lora_A   {adapter: module}    ...query.lora_A.default.weight      a column
    |- lora_B   {adapter: module}    ...query.lora_B.default.weight      a column
    |- scaling  {adapter: number}                                        a column of plain numbers
    |- slots    {adapter: Slot}      one adapter's view across the columns
    `- switch                        which adapters are on; shared by the whole model

Columns are modules or parameters of the layer itself, so that optimisers, checkpoints, FSDP2 and ``.to()`` see ordinary
PyTorch. What the layer computes is in ``layer.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from ..composition import Block
from ..config import PeftConfig
from ..injection.targets import block_index
from ..kinds import LayerKind
from ..method import Method, Slot
from ..switch import Setting, Switch

if TYPE_CHECKING:
    from .layer import AdaptedLayer


class SlottedLayer(nn.Module):
    """The part of an adapted layer that knows its adapters; the verbs on a single layer are those of PEFT.

    A layer that is switched by itself falls back in line when the model is switched.
    """

    def __init__(self, base_layer: nn.Module, kind: LayerKind, switch: Switch) -> None:
        super().__init__()
        self.base_layer, self.kind, self.switch = base_layer, kind, switch
        self.slots: dict[str, Slot] = {}
        self.block: int | None = None  # index of the model's block that the layer is in
        self.merged_adapters: list[str] = []
        self.merged_composition: Block | None = None  # how they were merged together; None: in order
        self.apart: tuple[int, dict[str, Any]] = (
            -1,
            {},
        )  # own changes, and the switch's epoch they belong to

    # ------------------------------------------------------------------ the layer itself

    @property
    def host(self) -> nn.Module:
        """The module that owns the adapted parameter."""
        return self.get_base_layer()

    def get_base_layer(self) -> nn.Module:
        """Return the layer as it was before any adapter."""
        layer: nn.Module = self
        while isinstance(layer, SlottedLayer):
            layer = cast(
                "nn.Module", layer._modules["base_layer"]
            )  # past __getattr__, for every forward pass
        return layer

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
                raise ValueError(
                    f"adapter {name!r} cannot share layer {path} with an adapter that keeps {column!r} in another form"
                )
        slot = Slot(cast("AdaptedLayer", self), name, method, config, path)
        for column, entry in columns.items():
            if column not in self._modules and column not in self.__dict__:
                setattr(self, column, _column_type(entry)())
            self.column(column)[name] = entry
            slot.columns.append(column)
            if isinstance(entry, nn.Module):
                entry.train(self.training)
        self.slots[name], self.block = slot, block_index(path)
        return slot

    def remove(self, name: str) -> None:
        """Drop an adapter and every column that held nothing else."""
        slot = self.slots.pop(name)
        for column in list(slot.columns):
            self.drop(column, slot)

    def drop(self, column: str, slot: Slot) -> None:
        """Drop one of an adapter's columns, and the column itself if it held nothing else."""
        slot.columns.remove(column)
        del self.column(column)[slot.name]
        if not len(self.column(column)):
            delattr(self, column)

    def train(self, mode: bool = True) -> SlottedLayer:
        """Set training or evaluation mode; what slots remember of their tensors is forgotten."""
        for slot in self.slots.values():
            slot.cache.clear()
        super().train(mode)
        return self

    # ------------------------------------------------------------------ on and off

    def setting(self) -> Setting:
        """Return the setting that holds for this layer in this thread."""
        return self._here(self.switch.now())

    def common_setting(self) -> Setting:
        """Return the setting that holds for this layer in all threads that have none of their own."""
        return self._here(self.switch.setting)

    def _here(self, setting: Setting) -> Setting:
        if setting.skip_layers and self.block in setting.skip_layers:
            return _NOTHING_ON[setting.enabled]
        epoch, changes = self.apart
        return replace(setting, **changes) if epoch == self.switch.epoch else setting

    def live_slots(self, setting: Setting) -> list[Slot]:
        """Return the slots that act in a forward pass, in order: none where they are off or merged."""
        if not setting.enabled or self.merged_adapters:
            return []
        return [self.slots[name] for name in setting.active if name in self.slots]

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that are on; not all of them need to sit on this layer."""
        return list(self.setting().active)

    @property
    def active_adapter(self) -> list[str]:
        """The same as ``active_adapters``, as in PEFT."""
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether the layer runs without adapters."""
        return not self.setting().enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters active on this layer, and theirs the only trainable parameters of it (none in inference mode)."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        for name in self.slots:
            self.set_requires_grad(name, requires_grad=name in names and not inference_mode)
        self._set_apart(active=names, composition=None)

    def enable_adapters(self, enabled: bool) -> None:
        """Turn the adapters of this layer on or off."""
        self._set_apart(enabled=enabled)

    def _set_apart(self, **changes: Any) -> None:
        epoch, present = self.apart
        self.apart = (self.switch.epoch, (present if epoch == self.switch.epoch else {}) | changes)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make the parameters of adapters on this layer trainable or not."""
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            if name in self.slots:
                for p in self.slots[name].parameters().values():
                    p.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out of this layer, if it has it."""
        if adapter_name in self.slots:
            self.remove(adapter_name)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to ``scale`` times what its configuration says."""
        if (slot := self.slots.get(adapter)) is not None and "scaling" in slot.columns:
            self.column("scaling")[adapter] = scale * slot.method.unit_scale(slot)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for name in self.active_adapters:
            if name in self.slots and "scaling" in self.slots[name].columns:
                self.column("scaling")[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters, or set it back to what their configurations say."""
        for name in self.active_adapters:
            if scale is None:
                self.set_scale(name, 1.0)
            elif name in self.slots and "scaling" in self.slots[name].columns:
                self.column("scaling")[name] /= scale


_NOTHING_ON = {enabled: Setting(enabled=enabled) for enabled in (False, True)}


class BufferDict(nn.Module):
    """Tensors by adapter name that are no parameters: saved, moved and cast with the model, never trained."""

    def __getitem__(self, name: str) -> Tensor:
        return cast("Tensor", self._buffers[name])

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor)

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __len__(self) -> int:
        return len(self._buffers)

    def __contains__(self, name: object) -> bool:
        return name in self._buffers


def _column_type(entry: Any) -> type:
    if isinstance(entry, nn.Module):
        return nn.ModuleDict
    if isinstance(entry, nn.Parameter):
        return nn.ParameterDict
    return BufferDict if isinstance(entry, Tensor) else dict
