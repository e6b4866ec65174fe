"""A text for a text, by an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

from ..data import Layout, Table
from ..engine import Engine
from .base import Task
from .generation import generate_texts
from .perplexity import perplexity, token_losses

if TYPE_CHECKING:
    import numpy as np
    import torch


class TheTask(Task):
    """Sequence to sequence."""

    layouts = (Layout(("prompt",), ("response",)),)
    auto_class = "AutoModelForSeq2SeqLM"
    task_type = "SEQ_2_SEQ_LM"
    generates = True

    @property
    def metric(self) -> tuple[str, bool]:
        return "perplexity", False

    def encode(self, table: Table) -> Dataset:
        columns = dict(self.processor(table["prompt"], truncation=True, max_length=self.settings.max_length))
        if "response" in table:
            columns["labels"] = self.processor(
                text_target=table["response"], truncation=True, max_length=self.settings.max_length
            )["input_ids"]
        return Dataset.from_dict(columns)

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return dict(DataCollatorForSeq2Seq(self.processor)(list(rows)))

    def reduce(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        return token_losses(super().reduce(logits, labels), labels)

    def measure(self, predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        return perplexity(predicted)

    def answer(self, engine: Engine, table: Table) -> Iterator[dict[str, Any]]:
        prompts = self.processor(table["prompt"], truncation=True, max_length=self.settings.max_length)[
            "input_ids"
        ]
        for text in generate_texts(engine, self.processor, prompts, side="right"):
            yield {"generated": text}
