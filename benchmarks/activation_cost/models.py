"""The two models, without dropout, and what is run of them. It works with transformers 4.57 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

VOCABULARY = 1000
ROOM = 64
"""Positions beyond the length of the input, for virtual tokens and for what is generated."""
MODELS = ("bert", "gpt2")


@dataclass(frozen=True)
class Size:
    """The size of a model and of its input; the feed-forward block is four times as wide."""

    width: int
    layers: int
    batch: int
    length: int

    def tokens(self) -> Tensor:
        """Return the input, ``[batch, length]``."""
        return torch.randint(
            VOCABULARY, (self.batch, self.length), generator=torch.Generator().manual_seed(0)
        )


def build(name: str, size: Size) -> nn.Module:
    """Return a model of random values, the same ones at every call."""
    torch.manual_seed(0)
    heads, positions = max(1, size.width // 64), size.length + ROOM
    if name == "bert":
        told = BertConfig(
            vocab_size=VOCABULARY, hidden_size=size.width, num_hidden_layers=size.layers, num_attention_heads=heads,
            intermediate_size=4 * size.width, max_position_embeddings=positions, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return BertModel(told, add_pooling_layer=False)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=size.width, n_layer=size.layers, n_head=heads, n_positions=positions, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@dataclass
class Case:
    """A model with adapters, ready to run.

    Attributes:
        model: the model.
        more: further arguments of each call.
    """

    model: Any
    more: Mapping[str, Any] = field(default_factory=dict)

    def loss(self, tokens: Tensor) -> Tensor:
        """Return a number that depends on all outputs, with gradients asked for down to the input embeddings."""
        embeddings = self.model.get_input_embeddings()(tokens).detach().requires_grad_()
        output: Tensor = self.model(inputs_embeds=embeddings, **self.more)[0]
        return output.square().mean()

    def step(self, tokens: Tensor) -> None:
        """Run forward and backward, without an optimizer."""
        self.loss(tokens).backward()  # type: ignore[no-untyped-call]
        self.model.zero_grad(set_to_none=True)

    def forward(self, tokens: Tensor) -> None:
        """Run forward alone."""
        with torch.no_grad():
            self.model(input_ids=tokens, **self.more)

    def generate(self, tokens: Tensor, count: int) -> None:
        """Generate this many tokens, always the likeliest, with a cache."""
        with torch.no_grad():
            self.model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                **self.more,
            )

    def trained(self) -> int:
        """Return how many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)
