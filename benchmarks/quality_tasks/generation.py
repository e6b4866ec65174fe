"""Decoders: descriptions from facts (E2E NLG), and letters in descending order."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .task import SPLITS, Batch, Task
from .text import padded, rows

IGNORED = -100
NO_DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop")


def decoder(folder: Path, pretrained: bool) -> nn.Module:
    """Return the model of a folder with its weights or with random ones, without dropout."""
    config = AutoConfig.from_pretrained(folder)
    for name in NO_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    if pretrained:
        return cast(nn.Module, AutoModelForCausalLM.from_pretrained(folder, config=config))
    return cast(nn.Module, AutoModelForCausalLM.from_config(config))


@dataclass(frozen=True, kw_only=True)
class Responses(Task):
    """Columns ``prompt`` and ``response``; the loss is that of the response and of the token that ends it, in nats per token.

    Args:
        data: folder below ``data``.
        decoder: folder below ``models``.
    """

    data: str
    decoder: str

    def folders(self) -> tuple[str, ...]:
        return (f"data/{self.data}", f"models/{self.decoder}")

    def examples(self, shared: Path) -> dict[str, list[Any]]:
        tokenizer = AutoTokenizer.from_pretrained(shared / "models" / self.decoder)
        # The decoder's stories were told apart by the start token alone: it never learnt an end token.
        start = end = [tokenizer.bos_token_id]
        found = {}
        for split in SPLITS:
            part = rows(shared / "data" / self.data / f"{split}.jsonl.gz")[: self.most.get(split)]
            prompts = tokenizer([row["prompt"] + "\n" for row in part], add_special_tokens=False).input_ids
            responses = tokenizer([row["response"] for row in part], add_special_tokens=False).input_ids
            found[split] = [(start + p, r + end) for p, r in zip(prompts, responses, strict=True)]
        return found

    def model(self, shared: Path, pretrained: bool) -> nn.Module:
        return decoder(shared / "models" / self.decoder, pretrained)

    def batch(self, examples: Sequence[Any]) -> Batch:
        labels = padded([[IGNORED] * len(prompt) + response for prompt, response in examples], IGNORED)
        ids = padded([prompt + response for prompt, response in examples], 0)
        # Padding lies to the right of all that is scored, and attention looks to the left: no mask is needed.
        return {"input_ids": ids, "labels": labels}

    def length(self, example: Any) -> int:
        return len(example[0]) + len(example[1])

    def score(self, model: nn.Module, batches: Sequence[Batch]) -> float:
        counts = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
        losses = [float(self.loss(model, batch)) for batch in batches]
        return sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)


@dataclass(frozen=True, kw_only=True)
class Sorting(Task):
    """Six letters of A, B, C, then the same letters sorted; the model sorts ascending before it is trained.

    The 729 inputs are divided at random: no input of the test is trained on. All six outputs right under the true
    prefix is the same as greedy generation being right.
    """

    decoder: str
    places: int = 6
    letters: int = 3

    def folders(self) -> tuple[str, ...]:
        return (f"models/{self.decoder}",)

    def examples(self, shared: Path) -> dict[str, list[Any]]:
        inputs = list(itertools.product(range(self.letters), repeat=self.places))
        random.Random(0).shuffle(inputs)
        pairs = [[*letters, *sorted(letters, reverse=True)] for letters in inputs]
        return {"train": pairs[:429], "dev": pairs[429:529], "test": pairs[529:]}

    def model(self, shared: Path, pretrained: bool) -> nn.Module:
        return decoder(shared / "models" / self.decoder, pretrained)

    def batch(self, examples: Sequence[Any]) -> Batch:
        return {"input_ids": torch.tensor(examples)}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, answers = self._answers(model, batch)
        loss = cross_entropy(logits.flatten(0, 1), answers.flatten())
        return loss + model.penalty() if hasattr(model, "penalty") else loss  # type: ignore[operator]

    def score(self, model: nn.Module, batches: Sequence[Batch]) -> float:
        answered = (self._answers(model, batch) for batch in batches)
        right = torch.cat([(logits.argmax(-1) == answers).all(-1) for logits, answers in answered])
        return right.double().mean().item()

    def _answers(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        ids = batch["input_ids"]
        logits = model(input_ids=ids[:, :-1]).logits
        return logits[:, self.places - 1 :], ids[:, self.places :]
