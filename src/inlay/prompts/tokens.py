"""Virtual tokens in front of the embedded input, and all that has one entry per token along with them.

In a mixed batch the samples may have prompts of different lengths. Shorter ones are filled up with entries that the mask
shuts off: on the left of everything for models that read from left to right (the last token is the one that counts), on the
right of everything for the others (BERT's classifier reads the first). Every sample then computes what it computes alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..composition.rows import rows_of_each


@dataclass
class Tokens:
    """The virtual tokens of a batch.

    Attributes:
        embeddings: ``[batch, n, d]``, an expanded view where all samples have the same.
        empty: for each sample, how many of the ``n`` are only there to fill up, on the left; None where none is.
    """

    embeddings: Tensor
    empty: Tensor | None = None

    @classmethod
    def same_for_all(cls, prompt: Tensor, rows: int) -> Tokens:
        """Return the tokens ``prompt[n, d]`` in front of every sample, without copying them."""
        return cls(prompt.unsqueeze(0).expand(rows, -1, -1))

    @classmethod
    def of_each(cls, prompts: list[Tensor], rows: int) -> Tokens:
        """Return each sample's own tokens ``[n_i, d]``; ``rows`` may be a multiple of the samples.

        Raises:
            ValueError: it is not.
        """
        repeats = rows_of_each(len(prompts), rows, "the model")
        longest = max(len(p) for p in prompts)
        stacked = torch.stack([pad(p, (0, 0, longest - len(p), 0)) for p in prompts])
        empty = torch.tensor([longest - len(p) for p in prompts], device=stacked.device)
        stacked, empty = (t.repeat_interleave(repeats, dim=0) for t in (stacked, empty))
        return cls(stacked, empty if bool(empty.any()) else None)

    @property
    def count(self) -> int:
        """Number of virtual tokens, with those that fill up."""
        return self.embeddings.shape[1]

    def mask(self, like: Tensor) -> Tensor:
        """Return the mask ``[batch, n]`` of the virtual tokens: 1 for those that a sample really has."""
        if self.empty is None:
            return like.new_ones(like.shape[0], self.count)
        return (torch.arange(self.count, device=like.device) >= self.empty[:, None]).to(like.dtype)

    def in_front(self, own: Tensor, value: int | Tensor = 0) -> Tensor:
        """Return ``own[batch, t, ...]`` with a value (or ``[batch, n, ...]`` of them) in front."""
        if not isinstance(value, Tensor):
            value = own.new_full((own.shape[0], self.count), value)
        return torch.cat([value, own], dim=1)

    def positions(self, own: Tensor) -> Tensor:
        """Return position ids for virtual and own tokens, given those of the own ones, counted on from the virtual ones."""
        virtual = torch.arange(self.count, device=own.device).expand(own.shape[0], -1)
        joined = torch.cat([virtual.to(own.dtype), own + self.count], dim=1)
        return joined if self.empty is None else (joined - self.empty[:, None]).clamp(min=0)

    def behind(self, padding: Tensor, joined: Tensor) -> Tensor:
        """Move the padding of own tokens from behind the virtual tokens in ``joined[batch, n + t, ...]`` to the left of them.

        In between it would push the virtual tokens out of a sliding window.

        Args:
            padding: for each sample, how many of its own tokens are padding, on the left.
            joined: virtual tokens, then own ones.
        """
        place, by = torch.arange(joined.shape[1], device=joined.device), padding[:, None]
        source = torch.where(
            place < by, place + self.count, torch.where(place < by + self.count, place - by, place)
        )
        return _picked(joined, source)

    def settled(self, joined: Tensor) -> Tensor:
        """Move what fills up from the left end of ``joined[batch, n + t, ...]`` to the right one."""
        if self.empty is None:
            return joined
        length = joined.shape[1]
        return _picked(joined, (torch.arange(length, device=joined.device) + self.empty[:, None]) % length)


def _picked(joined: Tensor, source: Tensor) -> Tensor:
    """Return the entries of ``joined[batch, m, ...]`` in the order ``source[batch, m]``."""
    return joined.gather(1, source.reshape(*source.shape, *[1] * (joined.dim() - 2)).expand_as(joined))
