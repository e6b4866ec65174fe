"""One attention module's view of the prefixes: which are on, as tensors that go in front of its keys and values."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..composition.rows import rows_of_each
from ..layers.taps import first_argument, first_input

if TYPE_CHECKING:
    from .prompts import Prompts

ATTRIBUTE = "inlay_prefix"
"""Where an attention module keeps its ``Site``."""


@dataclass
class Front:
    """What goes in front of keys and values in one call of an attention module.

    Attributes:
        keys: ``[1 or batch, heads, n, d]``; one for all samples is expanded, never copied by itself, unless it is gated.
        values: the same.
        allowed: ``[batch, n]``, False where a sample of a mixed batch has fewer virtual tokens; None where all are its own.
    """

    keys: Tensor
    values: Tensor
    allowed: Tensor | None

    @property
    def tokens(self) -> int:
        """Number of virtual tokens."""
        return self.keys.shape[2]

    def before(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values with the virtual ones in front."""
        return _joined(self.keys, key), _joined(self.values, value)


class _Heard(threading.local):
    value: Tensor | None = None


class Site:
    """The place of prefixes in one attention module.

    Args:
        prompts: the model's prompt adapters.
        layer: number of the module among those that take a prefix.
        biased: the module that has the learnt bias for distances, in models that have one.
    """

    def __init__(self, prompts: Prompts, layer: int, biased: nn.Module | None) -> None:
        self.prompts, self.layer = prompts, layer
        self.biased = biased
        self.heard = _Heard()
        self.argument = ""  # of the attention module, which names what it reads

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "heard"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, heard=_Heard())

    def listen(self, module: nn.Module, on: bool) -> None:
        """Keep what the attention module reads, for gates, from now on or no more."""
        hooks, marks = module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
        present = [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]
        if on and not present:
            self.argument = first_argument(module)
            module.register_forward_pre_hook(self.hear, with_kwargs=True)
        for key in () if on else present:
            del hooks[key]
            marks.pop(key, None)

    def hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the module's first input until ``live``: a hook that runs before the module."""
        if self.prompts.gated_now():
            self.heard.value = first_input(module, self.argument, args, kwargs)

    def live(self, rows: int, read: Tensor | None = None) -> Front | None:
        """Return what goes in front for a batch of this many rows, or None where no prefix is on.

        Args:
            rows: the number of rows.
            read: what the attention module reads, for gates; what was heard by default.
        """
        heard, self.heard.value = self.heard.value, None
        read = heard if read is None else read
        setting = self.prompts.switch.now()
        if not setting.enabled or not self.prompts.splicing:
            return None
        if setting.route is None:
            names = [n for n in setting.active if n in self.prompts.splicing]
            return self._concatenated(names, read) if names else None
        if not any(name in self.prompts.splicing for name in setting.route):
            return None
        return self._mixed(setting.route, rows, read)

    def _own(self, name: str, read: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return an adapter's keys and values ``[1 or batch, heads, n, d]``, gated by what the attention reads."""
        keys, values = (t.unsqueeze(0) for t in self.prompts.prefix(name, self.layer))
        if not self.prompts.gated(name):
            return keys, values
        assert read is not None
        gates = self.prompts.gates(name, self.layer, read).to(keys)[..., None, None, None]
        return keys * gates[:, 0], values * gates[:, 1]

    def _concatenated(self, names: list[str], read: Tensor | None) -> Front:
        parts = [self._own(name, read) for name in names]
        rows = max(len(keys) for keys, _ in parts)
        keys, values = (
            torch.cat([t.expand(rows, -1, -1, -1) for t in p], dim=2) if len(p) > 1 else p[0]
            for p in zip(*parts, strict=True)
        )
        return Front(keys, values, None)

    def _mixed(self, route: tuple[str, ...], rows: int, read: Tensor | None) -> Front:
        """Return each sample's own prefix, shorter ones filled up on the left with entries that nobody may see."""
        repeats = rows_of_each(len(route), rows, "attention")
        own = {n: self._own(n, read) for n in dict.fromkeys(route) if n in self.prompts.splicing}
        longest = max(keys.shape[2] for keys, _ in own.values())
        some = next(iter(own.values()))[0]
        nothing = some.new_zeros(1, some.shape[1], 0, some.shape[3])
        picked = [own.get(name, (nothing, nothing)) for name in route]
        keys, values = (
            torch.cat(
                [
                    nn.functional.pad(_of_sample(p[kind], i, repeats), (0, 0, longest - p[kind].shape[2], 0))
                    for i, p in enumerate(picked)
                ]
            )
            for kind in (0, 1)
        )
        counts = torch.tensor([k.shape[2] for k, _ in picked], device=some.device)
        allowed = torch.arange(longest, device=some.device) >= longest - counts[:, None]
        return Front(keys, values, allowed.repeat_interleave(repeats, dim=0))

    def distances(self, tokens: int, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """Return the learnt bias ``[1, heads, queries, tokens]`` of the virtual keys, as keys right before the first own one."""
        module: Any = self.biased
        length = query.shape[2]
        if module is None or not self.prompts.shift_now():
            return query.new_zeros(1, query.shape[1], length, tokens)
        past: Any = key.shape[2] - length
        if mask is not None:  # a static cache has room behind the last query, which the mask shuts off
            last = mask[0, 0, -1]
            seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
            past = (torch.arange(1, len(seen) + 1, device=seen.device) * seen).max() - length
        where = module.relative_attention_bias.weight.device
        past = past.to(where) if isinstance(past, Tensor) else past
        bias: Tensor = module.compute_bias(length, tokens, device=where, past_seen_tokens=past + tokens)
        return bias


def extended_mask(
    mask: Tensor | None, front: Front, own: int, like: Tensor, additive: bool = False
) -> Tensor | None:
    """Return a mask ``[..., queries, keys]`` that lets everybody see the prefix, of whoever has it.

    Args:
        mask: boolean (True may be seen) or added to the scores; None for no mask.
        front: the prefix.
        own: the number of own keys, without the prefix.
        like: a tensor of the dtype and device that the mask has to have where there is none yet.
        additive: which of the two a mask has to be where there is none yet.
    """
    if mask is None:
        if front.allowed is None:
            return None
        mask = torch.ones(1, 1, 1, own, dtype=torch.bool, device=like.device)
        mask = torch.zeros_like(mask, dtype=like.dtype) if additive else mask
    mask = mask[..., :own]
    left = torch.zeros((), dtype=mask.dtype, device=mask.device)
    if mask.dtype == torch.bool:
        left = left.logical_not()
    if front.allowed is None:
        left = left.expand(*mask.shape[:-1], front.tokens)
    else:
        allowed = front.allowed[:, None, None, :].to(mask.device)
        shut = (
            torch.zeros_like(left)
            if mask.dtype == torch.bool
            else left.new_full((), torch.finfo(mask.dtype).min)
        )
        mask = mask.expand(len(allowed), -1, -1, -1)
        left = torch.where(allowed, left, shut).expand(*mask.shape[:-1], front.tokens)
    return torch.cat([left, mask], dim=-1)


def _of_sample(prefix: Tensor, sample: int, repeats: int) -> Tensor:
    """Return the rows ``[repeats, heads, n, d]`` of one sample, of a prefix that is one for all or has its own rows."""
    if len(prefix) == 1:
        return prefix.expand(repeats, -1, -1, -1)
    return prefix[sample * repeats : (sample + 1) * repeats]


def _joined(front: Tensor, own: Tensor) -> Tensor:
    return torch.cat([front.to(own).expand(own.shape[0], -1, -1, -1), own], dim=2)
