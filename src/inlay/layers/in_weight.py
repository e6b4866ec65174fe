"""Adapters whose values stand in the base weight itself, so that the adapted layer costs what the frozen layer costs.

A method with ``in_weight`` (SHiRA) adds a few numbers to a few entries of W. Instead of computing with ``W + S`` beside W,
the layer's own weight *becomes* W' when the adapter first runs, and W again when somebody asks for the base:

    first forward pass        the originals at the mask are kept, values are added in place             k writes
    after an optimizer's step the entries are written anew, from the originals and the new values       k writes
    another adapter is on     the originals are put back, bit for bit, then that one's values go in     k + k' writes
    base_matrix(), a with block of one thread     a copy with the originals put back; W' stays where it is
    merge, save, state_dict, .to(), copy, remove  the originals are put back

What keeps this right under autograd: each *content* of the weight (the base, the values of one adapter as they are now, ...)
has a version number of its own, and whenever a content returns, so does its number. A graph that saved W' is valid exactly
while W' stands there: backward brings it back first where it can (a model switched to a reference adapter and back), and
where it cannot, because the values have changed since, autograd's own check raises. No wrong gradient passes silently.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels.sparse_values import linear_with_values, weight_with_values
from ..kernels.tracing import being_traced
from ..kinds import Linear
from ..method import Slot
from .weight_entries import Stamp, places_of, positions_of, put, stamp_of, sums, take

if TYPE_CHECKING:
    from .layer import AdaptedLayer

_LOCK = threading.RLock()  # held for a few writes, never while a layer computes
_REMEMBERED = 4
"""Contents whose version numbers are kept."""
_APART = 64
"""Between version numbers of contents, so that a few foreign writes do not lead from one to another."""


@dataclass
class Entered:
    """The values of one slot that stand in the weight, and what stood there before."""

    slot: Slot
    positions: Tensor
    originals: Tensor
    written: Tensor


class InWeight:
    """What stands in the base weight of one layer right now. Plain state of the layer: copied and pickled with it.

    Attributes:
        weight: the parameter that is written to, as it was found outside of a forward pass; where a forward pass finds another
            one in its place (FSDP2, offloading, ``functional_call``), that one is left alone.
        entered: the slots whose values are in, in the order in which they were added.
        shared: whether another module uses the same parameter, which is then never written to.
    """

    def __init__(self, layer: AdaptedLayer) -> None:
        self.layer, self.shared = layer, False
        self.highest = 0  # version number given so far
        self.adopt()

    def adopt(self) -> None:
        """Take the layer's present parameter for the one to write to; nothing must be in it."""
        self.weight: nn.Parameter | None = self.layer.host._parameters.get(self.layer.kind.param)
        self.entered: list[Entered] = []
        self.stamp: Stamp = ()
        # Whether the values may have changed without their version numbers: after a backward pass, for optimizers that write
        # past autograd, and after train() or eval().
        self.stale = False
        # The version number of each content, and the tensors that its stamp refers to.
        self.known: dict[Stamp, tuple[int, Any]] = {}

    # ------------------------------------------------------------------ running

    def run(self, slots: Sequence[Slot], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer with these adapters: those that can be in the weight from there, the others as they always do."""
        layer = self.layer
        inside = self._to_enter(slots)
        if not self.settle(inside):
            if slots:
                return layer._run_merged(slots, x, *args, **kwargs)
            return layer._run_with({layer.kind.param: self.base()}, x, *args, **kwargs)
        if not inside:
            return layer._run_beside(slots, x, *args, **kwargs)
        y = self._run_inside(inside, x, *args, **kwargs)
        for slot in slots:
            if not slot.method.in_weight:
                y = slot.method.after(slot, x, y)
        return y

    def _run_inside(self, slots: Sequence[Slot], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer, kind = self.layer, self.layer.kind
        recall = partial(self.recall, tuple(slots), self.stamp)
        if not _learning(slots):
            y = layer.base_layer(x, *args, **kwargs)
        elif len(slots) == 1 and isinstance(kind, Linear) and layer._is_bare() and not args and not kwargs:
            indices, values = slots[0].method.entries(slots[0])
            w = kind.matrix(self._parameter())
            return linear_with_values(x, w, layer.base_bias(), values, indices, recall)
        else:
            y = layer._run_with({kind.param: self.differentiable(slots)}, x, *args, **kwargs)
        if torch.is_grad_enabled():
            for tensor in y if isinstance(y, (tuple, list)) else (y,):
                if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(lambda grads: recall())
        return y

    def read(self, slots: Sequence[Slot]) -> Tensor | None:
        """Return the adapted weight for a parent that reads it; None where it has to be merged."""
        if not all(slot.method.in_weight for slot in slots) or not self._can_hold(slots):
            return None if slots else self.base()
        return self.differentiable(slots) if self.settle(slots) else None if slots else self.base()

    def differentiable(self, slots: Sequence[Slot]) -> Tensor:
        """Return the weight, which holds these slots' values, as a function of them: the same memory, with a gradient."""
        w = self._parameter()
        if not _learning(slots):
            return w
        values = [slot.method.entries(slot)[1] for slot in slots]
        return weight_with_values(w, [entered.positions for entered in self.entered], values)

    def _to_enter(self, slots: Sequence[Slot]) -> list[Slot]:
        """Return those of the adapters whose values can be in the weight when all of these act."""
        inside = [slot for slot in slots if slot.method.in_weight]
        rest = [slot for slot in slots if not slot.method.in_weight]
        return inside if self._can_hold(inside) and self._composes(rest) else []

    def _composes(self, rest: Sequence[Slot]) -> bool:
        methods = [slot.method for slot in rest]
        return not rest or (
            self.layer.kind.direct and all(m.additive and m.works_on_activations() for m in methods)
        )

    def _can_hold(self, slots: Sequence[Slot]) -> bool:
        """Whether the weight may be written to here and now. Compilers and transforms see plain operations instead."""
        w, layer = self.weight, self.layer
        return (
            w is not None
            and not self.shared
            and not w.requires_grad
            and layer.host._parameters.get(layer.kind.param) is w
            and not _traced()
            and ([entered.slot for entered in self.entered] == slots or self._may_enter(slots, w))
        )

    def _may_enter(self, slots: Sequence[Slot], w: Tensor) -> bool:
        """Whether tensors are of the kinds that can be written to, and whose changes can be seen."""
        tensors = (t for slot in slots for t in slot.saved().values())
        return self.layer.store.plain and _is_writable(w) and not any(t.is_inference() for t in tensors)

    # ------------------------------------------------------------------ contents

    def settle(self, slots: Sequence[Slot]) -> bool:
        """Make the weight hold the values of these slots, as they are now, and nothing else.

        Returns:
            False where the weight must stay as it is: other values are in it, and this thread has switched only for itself.
        """
        if _traced():
            return not self.entered
        if not self.layer.switch.is_temporary():
            self._hold(slots)
            return True
        with _LOCK:
            # First what all other threads are about to ask for, so that none of them writes while this one computes.
            setting = self.layer.common_setting()
            if setting.composition is None:
                self._hold(self._to_enter(self.layer.live_slots(setting)))
            return stamp_of(slots) == self.stamp

    def _hold(self, slots: Sequence[Slot]) -> None:
        stamp = stamp_of(slots)
        if stamp == self.stamp and not self.stale:
            return
        with _LOCK:
            if stamp != self.stamp or self.stale:  # another thread may have written it meanwhile
                self._write(slots, stamp)

    def withdraw(self) -> None:
        """Put the base back, for someone who reads or keeps the parameter; the next forward pass writes the values again."""
        with _LOCK:
            if self.entered:
                self._write((), ())

    def leave(self) -> None:
        """Put the base back for good: graphs of before are no longer brought to life."""
        self.withdraw()
        self.known.clear()

    def recall(self, slots: tuple[Slot, ...], stamp: Stamp) -> None:
        """Before a backward pass: bring back the content that its graph has saved, if it still exists."""
        with _LOCK:
            if stamp != self.stamp and stamp in self.known and stamp_of(slots) == stamp:
                self._write(slots, stamp)
            self.stale = True

    def base(self) -> Tensor:
        """Return the base weight in the layer's own layout: the parameter itself if nothing is in it, else a restored copy."""
        w: Tensor = self.layer.store.read(self.layer.host, self.layer.kind.param)
        if not self.entered or not _same_memory(w, self.weight):
            return w
        if torch.compiler.is_compiling():  # which cannot trace a lock
            return self._restored(w)
        with _LOCK:
            return self._restored(w)

    def _restored(self, w: Tensor) -> Tensor:
        copy = w.clone()
        for entered in reversed(self.entered):
            put(copy, entered.positions, entered.originals)
        return copy

    def _write(self, slots: Sequence[Slot], stamp: Stamp) -> None:
        w = self._parameter()
        with torch.inference_mode(False), torch.no_grad():
            alone = len(slots) == 1 and [entered.slot for entered in self.entered] == list(slots)
            if alone and places_of(stamp) == places_of(self.stamp):
                places = [self.entered[0].positions]
            else:
                places = [positions_of(slot, w) for slot in slots]  # first: it refuses what cannot be written
            version = self._version_for(stamp, w)
            if alone and torch.equal(places[0], self.entered[0].positions):
                self._renew(self.entered[0], w)
            else:
                while self.entered:
                    entered = self.entered.pop()
                    put(w, entered.positions, entered.originals)
                for slot, positions in zip(slots, places, strict=True):
                    originals = take(w, positions)
                    self.entered.append(Entered(slot, positions, originals, sums(originals, slot)))
                    put(w, positions, self.entered[-1].written)
            torch._C._autograd._unsafe_set_version_counter((w,), (version,))
        self.stamp, self.stale = stamp, False
        self.known[stamp] = (version, [slot.saved() for slot in slots])
        while len(self.known) > _REMEMBERED:
            del self.known[next(iter(self.known))]

    def _renew(self, entered: Entered, w: Tensor) -> None:
        """Write other values over the present ones of the only slot that is in."""
        written = sums(entered.originals, entered.slot)
        if w.device.type == "cpu" and torch.equal(written, entered.written):
            return  # to ask this elsewhere would cost more than to write
        entered.written = written
        put(w, entered.positions, written)

    def _version_for(self, stamp: Stamp, w: Tensor) -> int:
        """Return the version number of a content; a new one is above all that the weight has had."""
        present, tensors = self.known.pop(self.stamp, (w._version, []))
        if present != w._version:  # somebody else has written to the weight
            self._check_untouched(w)
            self.known.clear()
            present = w._version
        self.known[self.stamp] = (present, tensors)
        self.highest = max(self.highest, present)
        if stamp in self.known:
            return self.known[stamp][0]
        self.highest += _APART
        return self.highest

    def _check_untouched(self, w: Tensor) -> None:
        """Let foreign writes pass that left the values as they were, such as a broadcast between equal copies of a model.

        Raises:
            RuntimeError: the entries of the mask were changed, so that the base can no longer be told from the values.
        """
        if self.entered and not torch.equal(take(w, self.entered[-1].positions), self.entered[-1].written):
            names = [entered.slot.name for entered in self.entered]
            raise RuntimeError(
                f"the weight of a {type(self.layer.host).__name__} layer was changed in place while the values of adapters "
                f"{names} stood in it; call unmerge_adapter() before writing to base weights"
            )

    def _parameter(self) -> nn.Parameter:
        assert self.weight is not None
        return self.weight


def mark_shared(model: nn.Module, layers: Iterable[AdaptedLayer]) -> None:
    """Tell layers whose parameter another module uses as well that it is not theirs to write to."""
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for layer in layers:
        if layer.inside is not None and users[id(layer.inside.weight)] > 1:
            layer.inside.leave()
            layer.inside.shared = True


def _learning(slots: Sequence[Slot]) -> bool:
    return torch.is_grad_enabled() and any(p.requires_grad for s in slots for p in s.parameters().values())


def _traced() -> bool:
    """Whether plain operations are wanted: for a compiler, a transform of ``torch.func`` or a tracer."""
    return being_traced() or torch._C._get_tracing_state() is not None


def _is_writable(w: Tensor) -> bool:
    return (
        type(w) is nn.Parameter
        and w.is_floating_point()
        and w.device.type != "meta"
        and not w.is_inference()
        and not hasattr(w, "ds_id")  # DeepSpeed gathers such a parameter for the length of a forward pass
        and w.untyped_storage().nbytes() >= w.numel() * w.element_size()
    )


def _same_memory(a: Tensor, b: Tensor | None) -> bool:
    """Whether a tensor that stands in a parameter's place, as in ``functional_call``, is that parameter or a view of it."""
    if a is b or b is None or torch.compiler.is_compiling():
        return a is b
    while torch._C._functorch.is_functorch_wrapped_tensor(a):
        a = torch._C._functorch.get_unwrapped(a)
    return a.device == b.device and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
