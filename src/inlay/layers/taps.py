"""Taps: hooks by which an adapter at the end of a sub-layer learns of what happened elsewhere in it.

A sub-layer of a transformer (its attention, its feed-forward block) adds its result y to a residual r::

    entry(r) -> ... -> exit -> y        pre-norm:  h = y + r        post-norm:  h = norm(y + r)

The adapter sits on the module ``exit``. A ``ResidualTap`` on the module ``entry`` keeps r for it, a ``NormTap`` on the module
``norm`` puts out the adapter's result in place of the normalisation's. Both keep a value for one thread between two
modules of one forward pass, do nothing while no adapter of their layer is on, follow the model through ``copy.deepcopy`` and
``torch.save``, and move with the wrappers (``carry_taps``), so that they always sit on what is called.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn

from ..composition.rows import Groups

if TYPE_CHECKING:
    from .output import AdaptedOutput


@dataclass(frozen=True)
class Hung:
    """A place in a model: what hangs there now is looked up each time, because adapters wrap modules and unwrap them."""

    parent: nn.Module
    attribute: str

    @property
    def module(self) -> nn.Module:
        """The module that hangs there now."""
        return cast("nn.Module", self.parent._modules[self.attribute])


@dataclass(frozen=True)
class SubLayer:
    """Where a sub-layer takes its residual from, and which normalisation the model applies to ``y + r`` (None: none).

    Attributes:
        entry: where the module hangs whose first input is r.
        argument: the name of that input, for callers that give it by name.
        norm: where the normalisation hangs.
    """

    entry: Hung
    argument: str
    norm: Hung | None = None


@dataclass(frozen=True)
class Head:
    """Where the head of a language model hangs, in front of which invertible adapters are undone.

    Attributes:
        place: where it hangs.
        argument: the name of its first input, for callers that give it by name.
    """

    place: Hung
    argument: str


class Parked(threading.local):
    """What one thread has left for later, and what it is going on from (``sequence.py``)."""

    value: Any = None
    prompt: Any = None
    sums: list[tuple[Tensor, Tensor, Tensor]] | None = None


class Tap:
    """A hook that keeps a value for its own thread; the layer that it belongs to says whether it has work to do."""

    before: ClassVar[bool] = False
    """Whether it acts before the module that it hangs on, instead of after it."""
    always: ClassVar[bool] = False
    """Whether it acts after a module that has raised an exception as well."""

    def __init__(self, layer: AdaptedOutput) -> None:
        self.layer = layer
        self.parked = Parked()

    def take(self) -> Any:
        """Return the value of this thread, and forget it."""
        value, self.parked.value = self.parked.value, None
        return value

    def park(self, value: Any) -> None:
        """Keep a value for this thread."""
        self.parked.value = value

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "parked"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.parked = Parked()


class ResidualTap(Tap):
    """A forward pre-hook that keeps the first input of the module it sits on."""

    before = True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the input, while an adapter is on that may ask for it."""
        if self.layer.acts():
            assert self.layer.kind.sublayer is not None
            self.park(first_input(module, self.layer.kind.sublayer.argument, args, kwargs))

    @contextmanager
    def sharing_sums(self) -> Iterator[None]:
        """Within the block, adapters that act on the same y and r share one ``y + r``, and what is kept of it for backward."""
        self.parked.sums = []
        try:
            yield
        finally:
            self.parked.sums = None

    def sum_of(self, y: Tensor, r: Tensor) -> Tensor:
        """Return ``y + r``."""
        if self.parked.sums is None:
            return y + r
        for left, right, made in self.parked.sums:
            if left is y and right is r:
                return made
        self.parked.sums.append((y, r, y + r))
        return self.parked.sums[-1][2]


class NormTap(Tap):
    """A forward hook that replaces a normalisation's output by what an adapter has left for it.

    The value is None, the whole output, or those of the groups of a mixed batch.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return what was left, if anything was."""
        value = self.take()
        if value is None or not self.layer.acts():
            return None
        return value.instead_of(output) if isinstance(value, Passing) else value


@dataclass(frozen=True)
class Passing:
    """What adapters of a mixed batch put in place of a normalisation's output.

    Attributes:
        groups: the batch's rows by adapter.
        outputs: for each group its rows, or None where they go through the normalisation.
    """

    groups: Groups
    outputs: tuple[Tensor | None, ...]

    def instead_of(self, output: Tensor) -> Tensor:
        """Return a normalisation's output with these rows in it."""
        if all(rows is None for rows in self.outputs):
            return output
        pairs = zip(self.groups.split(output), self.outputs, strict=True)
        return self.groups.join([own if rows is None else rows.to(output.dtype) for own, rows in pairs])


def first_argument(module: nn.Module) -> str:
    """Return the name of the first argument of a module's ``forward``, empty where it has none."""
    return next(iter(inspect.signature(module.forward).parameters), "")


def first_input(module: nn.Module, argument: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return a module's first input, whether it was given by place or by name.

    Raises:
        TypeError: there is no tensor that could be it.
    """
    found = args[0] if args else kwargs.get(argument)
    if not isinstance(found, Tensor):
        raise TypeError(f"{type(module).__name__} was called without a tensor as its first input")
    return found


def set_tap(module: nn.Module, tap: Tap) -> None:
    """Hang a tap on a module, unless it hangs there."""
    if any(present is tap for present in taps_on(module)):
        return
    if tap.before:
        module.register_forward_pre_hook(cast("Any", tap), with_kwargs=True)
    else:
        module.register_forward_hook(cast("Any", tap), always_call=tap.always)


def taps_on(module: nn.Module) -> list[Tap]:
    """Return the taps on a module, in the order of their hanging."""
    hooks: list[Any] = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, Tap)]


def drop_tap(module: nn.Module, tap: Tap) -> None:
    """Take a tap off a module, if it hangs there."""
    places: list[tuple[dict[int, Any], dict[int, bool]]] = [
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ]
    for hooks, marks in places:
        for key in [key for key, hook in hooks.items() if hook is tap]:
            del hooks[key]
            marks.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


def carry_taps(old: nn.Module, new: nn.Module) -> None:
    """Move the taps from what hung in a place to what hangs there from now on."""
    for tap in taps_on(old):
        drop_tap(old, tap)
        set_tap(new, tap)
