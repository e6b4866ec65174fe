"""What the modules around a block know of its sequence, brought to the adapters on the block's output.

A block of a model is not told where in a sequence it is: it gets a mask that is worked into its attention, or none, and with a
cache only the newest positions. The modules around it are handed ``attention_mask [rows, columns]``, the cache and the labels. A
``SequenceTap`` on each of these reads them when the module is called and keeps them, for its thread, until the module returns;
the innermost one says what holds for the block::

    model(input_ids, attention_mask, labels)      the labels that count: what stands before them is the prompt
      decoder(inputs_embeds, attention_mask)      the mask of its own sequence
        block(hidden)  -> y[rows, positions, d]   x[rows, positions, 2], see ``positions.py``

x goes to the adapter beside y and is divided as y is, so that mixed batches and compositions need nothing of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..arguments import IGNORED, by_name, cached_length
from .positions import Context, Prompt
from .taps import Hung, Parked, Tap, drop_tap, set_tap, taps_on

if TYPE_CHECKING:
    from .output import AdaptedOutput

MASKS = {"attention_mask": False, "src_key_padding_mask": True, "tgt_key_padding_mask": True}
"""Names of masks of a sequence, and whether they mark padding instead of tokens."""
TEXT = ("input_ids", "inputs_embeds")
OTHER_INPUTS = ("pixel_values", "input_features", "input_values")


class Reader:
    """What one module's arguments say of the sequence.

    Args:
        module: the bare module.
        above: the modules around it, from the outermost one on.
    """

    def __init__(self, module: nn.Module, above: Sequence[nn.Module] = ()) -> None:
        self.names = tuple(inspect.signature(module.forward).parameters)
        masks = [name for name in MASKS if name in self.names]
        self.mask = masks[0] if masks else ""
        self.two = _has_two(module)  # of which the mask that it is given is the encoder's
        in_two = [outer for outer in above if _has_two(outer)]
        self.text = any(name in self.names for name in TEXT)
        own_input = not self.text and any(name in self.names for name in OTHER_INPUTS)
        encoder = any(getattr(outer, "encoder", None) is module for outer in in_two)
        self.alone = (own_input and not self.two) or encoder
        self.shifted = bool(in_two) and not encoder
        can_generate = getattr(module, "can_generate", None)
        self.answers = "labels" in self.names and can_generate is not None and bool(can_generate())

    @property
    def knows(self) -> bool:
        """Whether the module's arguments say anything."""
        return bool(self.mask or self.alone or self.two or self.text)

    def context(self, outer: Context | None, given: Mapping[str, Any], prompt: Prompt | None) -> Context:
        """Return what is known inside a call."""
        if outer is None or self.alone:
            outer = Context(prompt=prompt)
        found = replace(outer, found={}, shifted=self.shifted or outer.shifted)
        cache = given.get("past_key_values")
        if self.text and cache is not None:  # further inside, a block before this one may have filled it
            # transformers 4 says where it is; its static caches count keys that are not zero, as those of padding may be.
            told = given.get("cache_position")
            found.past = told[0] if isinstance(told, Tensor) and told.dim() == 1 else cached_length(cache)
        if self.answers and isinstance(labels := given.get("labels"), Tensor) and labels.dim() == 2:
            found.answers = labels != IGNORED
        if found.prompt is not None:
            found.real, found.told = found.prompt.mask, True
            if found.prompt.columns is None:
                found.prompt.columns = _columns(given, self.two)
            return found
        return found if self.two else self.masked(found, given)

    def masked(self, context: Context, given: Mapping[str, Any]) -> Context:
        """Return a context with the mask of a call's own."""
        if not self.mask:
            return context
        mask = given.get(self.mask)
        if mask is None:
            return replace(context, told=True)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            if mask.is_floating_point() and not MASKS[self.mask] and not self.text:
                return context  # something to be added to scores
            return replace(context, real=_tokens(mask, MASKS[self.mask]), told=True, found={})
        if context.told:
            return context
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else ()
        return replace(context, unreadable=shape, told=True)


class SequenceTap(Tap):
    """A forward pre-hook that reads a module's arguments; one for all adapted outputs inside the module."""

    before = True

    def __init__(self, reader: Reader, outer: SequenceTap | None) -> None:
        self.parked = Parked()
        self.reader, self.outer = reader, outer
        self.layers: list[AdaptedOutput] = []
        self.end = _SequenceEnd(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read and keep what the arguments say, while an adapter is on that may ask for it."""
        if any(layer.acts() for layer in self.layers):
            outer = None if self.outer is None else self.outer.parked.value
            given = by_name(self.reader.names, args, kwargs)
            self.park(self.reader.context(outer, given, self.parked.prompt))


class _SequenceEnd(Tap):
    """The forward hook that forgets it when the module returns."""

    always = True

    def __init__(self, begin: SequenceTap) -> None:
        self.parked = Parked()
        self.begin = begin

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.begin.park(None)


@dataclass(frozen=True)
class Outer:
    """A module around a block: the bare one, and where it hangs (None: it is the whole model)."""

    module: nn.Module
    place: Hung | None

    @property
    def hung(self) -> nn.Module:
        """What is called in its place: the module, or the wrapper around it."""
        return self.module if self.place is None else self.place.module


class Surroundings:
    """The modules around a block that know of its sequence, and the block's own arguments.

    Args:
        module: the bare block.
        around: the modules around it, from the outermost one on.
    """

    def __init__(self, module: nn.Module, around: Sequence[Outer]) -> None:
        bare = [outer.module for outer in around]
        readers = [Reader(outer, bare[:n]) for n, outer in enumerate(bare)]
        self.around = [(outer, reader) for outer, reader in zip(around, readers, strict=True) if reader.knows]
        self.own = Reader(module)
        self.innermost: SequenceTap | None = None

    def hang(self, layer: AdaptedOutput) -> None:
        """Set the taps that there are not yet, for a layer."""
        above: SequenceTap | None = None
        for outer, reader in self.around:
            tap = next((t for t in taps_on(outer.hung) if isinstance(t, SequenceTap)), None)
            if tap is None:
                tap = SequenceTap(reader, above)
                set_tap(outer.hung, tap)
                set_tap(outer.hung, tap.end)
            if not any(present is layer for present in tap.layers):
                tap.layers.append(layer)
            above = tap
        self.innermost = above

    def release(self, layer: AdaptedOutput) -> None:
        """Take off the taps that no other layer needs."""
        for outer, _ in self.around:
            for tap in [t for t in taps_on(outer.hung) if isinstance(t, SequenceTap)]:
                tap.layers = [other for other in tap.layers if other is not layer]
                if not tap.layers:
                    drop_tap(outer.hung, tap)
                    drop_tap(outer.hung, tap.end)

    def context(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Context:
        """Return what is known of the sequence in a call of the block.

        Raises:
            RuntimeError: the block runs by itself, outside of the modules that know.
        """
        known: Context | None = Context() if self.innermost is None else self.innermost.parked.value
        if known is None:
            raise RuntimeError(
                "a module with an adapter of single positions ran outside of the model around it, which knows what is padding: "
                "called by itself, or again for its gradients by checkpointing; adapt whole blocks, which are not run again"
            )
        return (
            known
            if known.prompt is not None
            else self.own.masked(known, by_name(self.own.names, args, kwargs))
        )


@contextmanager
def going_on_from(model: nn.Module, prompt: Callable[[], Prompt]) -> Iterator[None]:
    """Let a model's adapters know, in this thread, what ``generate`` was given; nothing is asked where there are none."""
    tap = next((tap for tap in taps_on(model) if isinstance(tap, SequenceTap)), None)
    if tap is None:
        yield
        return
    tap.parked.prompt = prompt()
    try:
        yield
    finally:
        tap.parked.prompt = None


def _has_two(module: nn.Module) -> bool:
    """Whether a module runs an encoder and a decoder."""
    names = inspect.signature(module.forward).parameters
    return "decoder_input_ids" in names or {"src_key_padding_mask", "tgt_key_padding_mask"} <= names.keys()


def _tokens(mask: Tensor, marks_padding: bool) -> Tensor:
    if marks_padding:
        return ~mask if mask.dtype == torch.bool else mask == 0
    return mask.bool()


def _columns(given: Mapping[str, Any], two: bool) -> int:
    names = [f"decoder_{name}" if two else name for name in ("inputs_embeds", "input_ids")]
    found = next((t for name in names if isinstance(t := given.get(name), Tensor)), None)
    return 0 if found is None else found.shape[1]
