"""What all prompt encoders share: an embedding of one row per virtual token, and what is computed from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class PromptModule(nn.Module):
    """The prompt encoder of one adapter. A subclass with a network overrides ``encode`` and ``computes``.

    Args:
        rows: number of virtual tokens.
        width: numbers per virtual token.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)
        self._kept: tuple[Any, Tensor] | None = None

    @property
    def computes(self) -> bool:
        """Whether the prompt is computed by a network, so that a file of the prompt alone is not the whole state."""
        return False

    def saved_beside(self) -> dict[str, str]:
        """Return ``{name of a parameter: its key in files}`` for what an adapter's file holds beside the prompt."""
        return {}

    def encode(self, embedded: Tensor) -> Tensor:
        """Return the prompt of embedded virtual tokens ``[..., n, width]``."""
        return embedded

    def forward(self, indices: Tensor | None = None) -> Tensor:
        """Return the prompt ``[..., n, d]`` of the given virtual tokens, or of all of them in order."""
        return self.encode(self.embedding.weight if indices is None else self.embedding(indices))

    def prompt(self) -> Tensor:
        """Return the whole prompt ``[n, d]``. Outside training it is kept until a parameter changes."""
        if not self.computes:
            return self.embedding.weight
        if self.computes_anew():
            return self()  # type: ignore[no-any-return]
        made_from = tuple((id(p), p._version) for p in self.parameters())
        if self._kept is None or self._kept[0] != made_from:
            self._kept = made_from, self()
        return self._kept[1]

    def computes_anew(self) -> bool:
        """Whether what is computed now must not be kept: it may get gradients, or is being traced by a compiler."""
        return self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()

    @torch.no_grad()
    def saved(self, values: dict[str, Tensor] | None = None) -> Tensor:
        """Return the prompt as a file holds it: without dropout, of the given parameter values or its own."""
        was_training = self.training
        self.eval()
        try:
            own = dict(self.named_parameters())
            return torch.func.functional_call(self, own | (values or {})).detach().clone()  # type: ignore[no-any-return]
        finally:
            self.train(was_training)

    def train(self, mode: bool = True) -> PromptModule:
        """Set training or evaluation mode; what was kept of the prompt is forgotten."""
        self._kept = None
        super().train(mode)
        return self


def encoder_values(state_dict: Mapping[str, Tensor] | None, name: str) -> dict[str, Tensor]:
    """Return what a state of a whole model holds of a prompt adapter's encoder, by the encoder's own names."""
    start = f"prompt_encoder.{name}."
    return {k.removeprefix(start): v for k, v in (state_dict or {}).items() if k.startswith(start)}
