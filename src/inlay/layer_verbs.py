"""What other libraries and scripts call on a single wrapped layer. Names and behaviour are those of PEFT's tuner layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layer import AdaptedLayer

    Base = AdaptedLayer
else:
    Base = object


class LayerVerbs(Base):
    """Switching, scaling and looking at one layer. A layer set apart this way falls back in line when the model is switched."""

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
        self._set_apart(active=names)

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
