"""Trainable tokens: train single rows of an embedding, for example of newly added tokens, and keep all others frozen.

    W'[token] = delta[i] for token = token_indices[i], else W[token]        W[num, dim], delta[tokens, dim]

delta starts as the rows it replaces, so the layer starts as itself. On the output layer tied to an embedding the same rows
are rows of W[out, in]. k * dim numbers are trained, and no copy of the embedding is made.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig, PeftType
from ..injection.targets import embedding_ends
from ..kinds import Embedding, LayerKind, Linear
from ..method import Column, Method, Slot


@dataclass(kw_only=True)
class TrainableTokensConfig(PeftConfig):
    """Configuration of trainable tokens on their own.

    Args:
        token_indices: the rows to train.
        target_modules: the embedding's name; the model's input embedding by default.
        init_weights: start from the present rows (True) or from random ones (False).
    """

    peft_type: PeftType | str | None = PeftType.TRAINABLE_TOKENS
    token_indices: list[int] = field(default_factory=list)
    target_modules: Collection[str] | str | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.token_indices)) != len(self.token_indices):
            raise ValueError(f"token_indices names a token twice: {sorted(self.token_indices)}")


class TrainableTokens(Method, name="TRAINABLE_TOKENS"):
    """W'[token] = delta[i]; see the top of this file."""

    config = TrainableTokensConfig
    saves_embedding = False

    def follows_tying(self, config: TrainableTokensConfig) -> bool:
        return True

    def become_twin(self, slot: Slot, owner: Slot) -> None:
        slot.layer.column("trainable_tokens_delta")[slot.name] = owner["trainable_tokens_delta"]

    def default_targets(
        self, config: TrainableTokensConfig, model: nn.Module, required: bool
    ) -> Collection[str] | str | None:
        embedding, _ = embedding_ends(model)
        return {path for path, module in model.named_modules() if module is embedding}

    def build(self, kind: LayerKind, config: TrainableTokensConfig, path: str) -> dict[str, Column]:
        if not isinstance(kind, (Embedding, Linear)):
            raise ValueError(f"trainable tokens need an embedding or an output layer; {path} is neither")
        num, dim = (
            (kind.in_features, kind.out_features)
            if isinstance(kind, Embedding)
            else (kind.out_features, kind.in_features)
        )
        wrong = [t for t in config.token_indices if not 0 <= t < num]
        if wrong or not config.token_indices:
            raise ValueError(
                f"token indices {wrong or '(none given)'} are not rows of {path}, which has rows 0 to {num - 1}"
            )
        delta = nn.Parameter(
            torch.empty(len(config.token_indices), dim, device=kind.device, dtype=kind.dtype)
        )
        return {"trainable_tokens_delta": delta}

    @torch.no_grad()
    def init(self, slot: Slot) -> None:
        delta = slot["trainable_tokens_delta"]
        if slot.config.init_weights:  # type: ignore[attr-defined]
            delta.copy_(_rows(slot, slot.weight()).index_select(0, _tokens(slot)))
        else:
            nn.init.normal_(delta)

    def after(self, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        delta, tokens = slot["trainable_tokens_delta"].to(y.dtype), _tokens(slot)
        if isinstance(slot.kind, Embedding):
            hit = x.unsqueeze(-1) == tokens
            row = nn.functional.embedding(hit.int().argmax(-1), delta)
            return torch.where(hit.any(-1, keepdim=True), slot.kind.scaled(row), y)
        logits, bias = nn.functional.linear(x.to(y.dtype), delta), slot.bias()
        if bias is not None:
            logits = logits + bias.index_select(0, tokens)
        return y.index_copy(-1, tokens, logits.to(y.dtype))

    def merge(self, slot: Slot, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return _rows(
            slot, _rows(slot, w).index_copy(0, _tokens(slot), slot["trainable_tokens_delta"].to(w.dtype))
        ), b


def _rows(slot: Slot, w: Tensor) -> Tensor:
    """Turn the canonical matrix W[out, in] so that its rows are tokens, or back."""
    return w.mT if isinstance(slot.kind, Embedding) else w


def _tokens(slot: Slot) -> Tensor:
    config: Any = slot.config
    return torch.tensor(config.token_indices, device=slot["trainable_tokens_delta"].device)
