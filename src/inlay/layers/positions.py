"""Where positions stand in their sequences, for adapters that act on the first or the last ones alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Prompt:
    """What ``generate`` was given: its mask ``[rows, columns]`` (None: no padding) and its length, as soon as it is known."""

    mask: Tensor | None
    columns: int | None


@dataclass
class Context:
    """What the modules around a block know of its sequence.

    Attributes:
        real: ``[rows, columns]``, True where there is a token, from the first column of the sequence on; None: everywhere.
        told: whether a module had the chance to say what is padding.
        unreadable: the shape of a mask that does not tell padding from what may not be seen.
        past: how many columns came in earlier calls.
        answers: ``[rows, columns]``, True where a label counts.
        shifted: whether the answer of a column is the next column's token, as in decoders beside an encoder.
        prompt: what ``generate`` is going on from.
    """

    real: Tensor | None = None
    told: bool = False
    unreadable: tuple[int, ...] | None = None
    past: Any = 0
    answers: Tensor | None = None
    shifted: bool = False
    prompt: Prompt | None = None
    found: dict[Any, Tensor] = field(default_factory=dict)

    def positions(self, y: Tensor) -> Tensor:
        """Return where the positions of an output ``[rows, positions, d]`` stand.

        Returns:
            ``[rows, positions, 2]``: the number of tokens before a token, and the number of tokens between it and the end of the
            prompt. Padding has -1 twice, and so has, in the second place, what comes after the prompt. An output ``[rows, d]`` of
            a model that knows no sequences is one of single positions, and gets ``[rows, 2]``.

        Raises:
            ValueError: it cannot be told which positions are padding.
        """
        if self.unreadable is not None:
            raise ValueError(
                f"an adapter of single positions cannot tell padding from a mask of shape {list(self.unreadable)}; pass "
                "attention_mask=[rows, columns] to the model"
            )
        if y.dim() != 3 and not (y.dim() == 2 and not self.told):
            raise ValueError(
                f"an adapter of single positions needs outputs [rows, positions, d], but got {list(y.shape)}; adapt whole blocks"
            )
        rows, length = y.shape[0], y.shape[1] if y.dim() == 3 else 1
        key = (rows, length, y.device)
        if key not in self.found:
            self.found[key] = self._located(rows, length, y.device)
        found = self.found[key]
        return found if y.dim() == 3 else found.squeeze(1)

    def _located(self, rows: int, length: int, device: torch.device) -> Tensor:
        columns = torch.arange(length, device=device) + self.past
        real = self._mask(rows, length, device)
        count = real.cumsum(1)
        inside = columns.clamp(max=real.shape[1] - 1)
        before = count[:, inside] - 1 + (columns - inside)
        token = real[:, inside] | (columns > inside)
        back = self._prompt_lengths(real, length)[:, None] - 1 - before
        return torch.stack([before, back.clamp(min=-1)], -1).masked_fill(~token[..., None], -1)

    def _mask(self, rows: int, length: int, device: torch.device) -> Tensor:
        """Return which columns hold a token, from the first one on; those beyond the last one all do."""
        if self.real is None:
            return torch.ones(rows, 1, dtype=torch.bool, device=device)
        known, columns = self.real.shape
        counted = isinstance(self.past, int) and self.prompt is None
        if rows % known or (counted and columns != self.past + length):
            raise ValueError(
                f"the mask [{known}, {columns}] of {self.past} earlier columns does not fit an output of [{rows}, {length}] "
                "positions, whose padding it should tell; adapt blocks that keep the positions as they are"
            )
        return self.real.to(device).repeat_interleave(rows // known, 0)

    def _prompt_lengths(self, real: Tensor, length: int) -> Tensor:
        """Return how many tokens of each row are the prompt's."""
        columns = length
        if self.prompt is not None:
            assert self.prompt.columns is not None
            columns = self.prompt.columns
        tokens = real[:, :columns].sum(1) + max(0, columns - real.shape[1])
        if self.prompt is not None:
            return tokens
        if isinstance(self.past, Tensor) or self.past:  # what the first call was given is the prompt
            return tokens * (torch.as_tensor(self.past, device=tokens.device) == 0)
        if self.answers is None:
            return tokens
        answers = self.answers.to(real.device).repeat_interleave(len(real) // len(self.answers), 0)
        if answers.shape[1] != length:
            raise ValueError(
                f"labels of {answers.shape[1]} columns do not say where the prompt of {length} positions ends"
            )
        count = answers.cumsum(1)
        asked = (count - answers.long() if self.shifted else count) == 0
        given = (asked & (real if real.shape[1] == length else real.expand(-1, length))).sum(1)
        return torch.where(given == 0, tokens, given)
