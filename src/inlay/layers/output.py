"""The wrapper of a module whose *output* is adapted: bottleneck adapters and their kin.

It is an ``AdaptedLayer`` whose adapters have no weight to change, so where other layers speak of one, this one says:

    forward              the module runs as it is; then ``after(slot, x, y)`` of each adapter that is on, one after the other,
                         additive or not: ``set_adapter(["a", "b"])`` puts b upon a. x is the residual of the sub-layer, or
                         the module's first input where no sub-layer was found, or where the positions of y stand in their
                         sequences, for adapters that ask for it (``sequence.py``)
    merge                refused: what such an adapter does is not linear
    base_matrix, delta   refused: there is no matrix
    weight, bias         those of the module inside, unchanged

It is always the outermost wrapper of its module: an adapter of the module's weight that comes later goes inside, and the
keys in files (``files/checkpoint.py``) do not tell whether such a wrapper is there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..composition.on_layers import after_composed
from ..composition.parts import Node
from ..composition.rows import groups_of
from ..config import PeftConfig
from ..kinds import Output
from ..kinds.output import Embedded, Positioned
from ..method import Method, Slot
from ..switch import Switch
from .inverse import InverseTap, invertible_part
from .layer import AdaptedLayer
from .recorded import put_on_record
from .taps import Hung, NormTap, Passing, ResidualTap, drop_tap, first_input, set_tap


class AdaptedOutput(AdaptedLayer):
    """A module and the adapters that act on its output.

    Args:
        base_layer: the module, or the wrapper around it.
        kind: the sizes of its output, and the sub-layer that it ends.
        switch: the model's switch.
    """

    kind: Output

    def __init__(self, base_layer: nn.Module, kind: Output, switch: Switch) -> None:
        super().__init__(base_layer, kind, switch)
        self.residual = ResidualTap(self) if kind.sublayer is not None else None
        self.after_norm = NormTap(self) if self._norm_place() is not None else None
        self.inverse = InverseTap(self) if isinstance(kind, Embedded) and kind.head is not None else None

    # ------------------------------------------------------------------ forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, then the adapters that the switch has on, on its output."""
        if not self.acts():
            return self.base_layer(*args, **kwargs)
        where = self.kind.surroundings.context(args, kwargs) if isinstance(self.kind, Positioned) else None
        output = self.base_layer(*args, **kwargs)
        y = _first_of(output, self.base_layer)
        x = self._input(args, kwargs, y) if where is None else where.positions(y)
        adapted = self._adapted(x, y)
        put_on_record(y, adapted)
        return _with_first(output, adapted)

    def _adapted(self, x: Tensor, y: Tensor) -> Tensor:
        """Return what the adapters that are on make of the output."""
        setting = self.setting()
        if self.inverse is not None and not torch.compiler.is_compiling():
            set_tap(
                self._head(), self.inverse
            )  # the head may be another one by now: the vocabulary was resized
        if setting.route is not None:
            return self._through_rows(setting.route, x, y)
        if setting.composition is not None:
            tree: Node = setting.composition
            if isinstance(self.kind, Embedded):
                tree = invertible_part(self, setting.composition)
            with nullcontext() if self.residual is None else self.residual.sharing_sums():
                return after_composed(self, tree, x, y, self.after_norm)
        return self._through(self.live_slots(setting), x, y)

    def acts(self) -> bool:
        """Whether an adapter of this layer is on, in this thread."""
        setting = self.setting()
        if setting.route is not None and setting.enabled:
            return any(name in self.slots for name in setting.route)
        return bool(self.live_slots(setting))

    def _input(self, args: Sequence[Any], kwargs: Mapping[str, Any], y: Tensor) -> Tensor:
        if isinstance(self.kind, Embedded):
            return y
        if self.residual is None:
            return first_input(self.get_base_layer(), self.kind.argument, args, kwargs)
        residual = self.residual.take()
        if residual is None:
            raise RuntimeError(
                f"a sub-layer's end ({type(self.get_base_layer()).__name__}) ran without its beginning before it, where the "
                "adapter takes the residual from; adapt modules by name (target_modules) in models that run their blocks in parts"
            )
        return cast("Tensor", residual)

    def _through(self, slots: Sequence[Slot], x: Tensor, y: Tensor) -> Tensor:
        for slot in slots:
            if self.after_norm is not None:  # whether the model's norm is passed by is up to the last adapter
                self.after_norm.park(None)
            y = slot.method.after(slot, x, y)
        return y

    def _through_rows(self, route: tuple[str, ...], x: Tensor, y: Tensor) -> Tensor:
        """Run each sample through its own adapter."""
        if x.shape[0] != y.shape[0]:
            raise ValueError(
                f"adapter_names needs as many rows in a residual ({x.shape[0]}) as in an output ({y.shape[0]})"
            )
        groups = groups_of(route, self.slots, len(y), "a module's adapters")
        passing: list[Tensor | None] = []

        def through(name: str, x: Tensor, y: Tensor) -> Tensor:
            slots = [self.slots[name]] if name in self.slots else []
            if self.after_norm is None:
                return self._through(slots, x, y)
            # The model's norm, which the adapter may use, has rows of this adapter alone.
            with self.switch.within(active=(name,), route=None):
                made = self._through(slots, x, y)
            passing.append(self.after_norm.take())
            return made

        made = groups.run(through, x, y)
        if self.after_norm is not None:
            self.after_norm.park(Passing(groups, tuple(passing)))
        return made

    # ------------------------------------------------------------------ the sub-layer

    def norm(self) -> nn.Module | None:
        """Return the normalisation that the model applies to ``y + r``, as it hangs there now; None where it has none."""
        place = self._norm_place()
        return None if place is None else place.module

    def with_residual(self, y: Tensor, r: Tensor) -> Tensor:
        """Return ``y + r``, which adapters that act together share."""
        return y + r if self.residual is None else self.residual.sum_of(y, r)

    def pass_norm(self, h: Tensor) -> None:
        """Let the model go on with h in place of what its normalisation is about to put out."""
        assert self.after_norm is not None
        self.after_norm.park(h)

    def _norm_place(self) -> Hung | None:
        return None if self.kind.sublayer is None else self.kind.sublayer.norm

    def _head(self) -> nn.Module:
        return cast("Any", self.kind).head.place.module  # type: ignore[no-any-return]

    def add(self, name: str, method: Method, config: PeftConfig, path: str) -> Slot:
        slot = super().add(name, method, config, path)
        if self.residual is not None and self.kind.sublayer is not None:
            set_tap(self.kind.sublayer.entry.module, self.residual)
        if self.after_norm is not None and (norm := self.norm()) is not None:
            set_tap(norm, self.after_norm)
        if self.inverse is not None:
            set_tap(self._head(), self.inverse)
        if isinstance(self.kind, Positioned):
            self.kind.surroundings.hang(self)
        return slot

    def remove(self, name: str) -> None:
        super().remove(name)
        if not self.slots:
            self.release()

    def release(self) -> None:
        """Take the hooks off the sub-layer, off the head, or off the modules around."""
        if self.residual is not None and self.kind.sublayer is not None:
            drop_tap(self.kind.sublayer.entry.module, self.residual)
        if self.after_norm is not None and (norm := self.norm()) is not None:
            drop_tap(norm, self.after_norm)
        if self.inverse is not None:
            drop_tap(self._head(), self.inverse)
        if isinstance(self.kind, Positioned):
            self.kind.surroundings.release(self)

    # ------------------------------------------------------------------ what needs a weight

    def base_matrix(self) -> Tensor:
        """Refuse: there is no weight.

        Raises:
            ValueError: always.
        """
        raise ValueError("an adapter on a module's output has no base weight")

    def base_bias(self) -> None:
        """Return None: there is no bias to adapt."""
        return None

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Do nothing where none of the adapters is named; there is no weight to write them into.

        Raises:
            ValueError: an adapter of this layer is to be merged.
        """
        names = self.setting().active if adapter_names is None else adapter_names
        for name in names:
            if name in self.slots:
                raise ValueError(not_linear(name, self.slots[name].method))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Refuse: the adapter adds nothing to a weight.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"adapter {adapter!r} acts on a module's output: it adds nothing to a weight")


def not_linear(name: str, method: Method) -> str:
    """Return the message for a merge that there cannot be."""
    return (
        f"adapter {name!r} ({type(method).__name__}) is not linear, so it cannot be merged into the base weights; "
        "use unload() to drop it, or save_pretrained() to keep it beside the model"
    )


def _first_of(output: Any, module: nn.Module) -> Tensor:
    first = output
    if isinstance(output, Mapping):
        first = next(iter(output.values()), None)
    elif isinstance(output, (tuple, list)):
        first = output[0] if output else None
    if not isinstance(first, Tensor):
        raise TypeError(
            f"{type(module).__name__} puts out a {type(first).__name__} first; an adapter on its output needs a tensor there"
        )
    return first


def _with_first(output: Any, y: Tensor) -> Any:
    """Return a module's output with another tensor in first place; the given one is not changed."""
    if isinstance(output, Tensor):
        return y
    if isinstance(output, tuple):
        values = (y, *output[1:])
        return type(output)(*values) if hasattr(output, "_fields") else values
    changed = copy.copy(output)
    changed[next(iter(output)) if isinstance(output, Mapping) else 0] = y
    return changed
