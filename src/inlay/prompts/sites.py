"""One attention module's view of the prefixes: which are on, as tensors that go in front of its keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .prompts import Prompts

ATTRIBUTE = "inlay_prefix"
"""Where an attention module keeps its ``Site``."""


@dataclass
class Front:
    """What goes in front of keys and values in one call of an attention module.

    Attributes:
        keys: ``[1 or batch, heads, n, d]``; one for all samples is expanded, never copied by itself.
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

    def live(self, rows: int) -> Front | None:
        """Return what goes in front for a batch of this many rows, or None where no prefix is on."""
        setting = self.prompts.switch.now()
        if not setting.enabled or not self.prompts.splicing:
            return None
        if setting.route is None:
            names = [n for n in setting.active if n in self.prompts.splicing]
            return self._concatenated(names) if names else None
        if not any(name in self.prompts.splicing for name in setting.route):
            return None
        return self._mixed(setting.route, rows)

    def _concatenated(self, names: list[str]) -> Front:
        parts = [self.prompts.prefix(name, self.layer) for name in names]
        keys, values = (torch.cat(p, dim=1) if len(p) > 1 else p[0] for p in zip(*parts, strict=True))
        return Front(keys.unsqueeze(0), values.unsqueeze(0), None)

    def _mixed(self, route: tuple[str, ...], rows: int) -> Front:
        """Return each sample's own prefix, shorter ones filled up on the left with entries that nobody may see."""
        if rows % len(route):
            raise ValueError(
                f"adapter_names has {len(route)} entries but attention received {rows} rows, not a multiple of it"
            )
        own = {
            n: self.prompts.prefix(n, self.layer) for n in dict.fromkeys(route) if n in self.prompts.splicing
        }
        longest = max(keys.shape[1] for keys, _ in own.values())
        some = next(iter(own.values()))[0]
        nothing = some.new_zeros(some.shape[0], 0, some.shape[2])
        picked = [own.get(name, (nothing, nothing)) for name in route]
        keys, values = (
            torch.stack([nn.functional.pad(p[kind], (0, 0, longest - p[kind].shape[1], 0)) for p in picked])
            for kind in (0, 1)
        )
        counts = torch.tensor([k.shape[1] for k, _ in picked], device=some.device)
        allowed = torch.arange(longest, device=some.device) >= longest - counts[:, None]
        repeats = rows // len(route)
        return Front(*(t.repeat_interleave(repeats, dim=0) for t in (keys, values, allowed)))

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


def _joined(front: Tensor, own: Tensor) -> Tensor:
    return torch.cat([front.to(own).expand(own.shape[0], -1, -1, -1), own], dim=2)
