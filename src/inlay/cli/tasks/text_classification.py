"""A class, or a number, for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding

from ..data import Layout, Table
from ..engine import Engine
from ..errors import UserError
from ..options import Train
from .base import Settings, Task, softmax
from .labels import class_metrics, label_arguments, label_ids, label_names, number_metrics


class TheTask(Task):
    """Text classification; regression where the labels are numbers with a fraction."""

    layouts = (Layout(("text",), ("label",), optional=("text2",)),)
    auto_class = "AutoModelForSequenceClassification"
    task_type = "SEQ_CLS"

    @property
    def metric(self) -> tuple[str, bool]:
        return ("rmse", False) if self.settings.regression else ("accuracy", True)

    @classmethod
    def settle(cls, settings: Settings, options: Train, table: Table, config: Any) -> Settings:
        labels = table["label"]
        guessed = all(_is_number(label) for label in labels) and any(
            not float(label).is_integer() for label in labels
        )
        settings.regression = guessed if options.regression is None else options.regression
        if settings.regression:
            _numbers(table)
        else:
            settings.labels = label_names(labels, config)
            if len(settings.labels) < 2:
                raise UserError(
                    f"{table.source.name}: all rows have the label {str(settings.labels[0])!r}; two classes are needed"
                )
        return settings

    def model_arguments(self) -> dict[str, Any]:
        if self.settings.regression:
            return {"num_labels": 1, "problem_type": "regression"}
        return label_arguments(self.settings.labels) | {"problem_type": "single_label_classification"}

    def encode(self, table: Table) -> Dataset:
        pair = (table["text2"],) if "text2" in table else ()
        columns = dict(
            self.processor(table["text"], *pair, truncation=True, max_length=self.settings.max_length)
        )
        if "label" in table:
            columns["labels"] = (
                _numbers(table)
                if self.settings.regression
                else label_ids(table, "label", self.settings.labels)
            )
        return Dataset.from_dict(columns)

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return dict(DataCollatorWithPadding(self.processor)(list(rows)))

    def measure(self, predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        if self.settings.regression:
            return number_metrics(predicted.reshape(-1), truth.reshape(-1))
        return class_metrics(predicted.argmax(-1), truth)

    def answer(self, engine: Engine, table: Table) -> Iterator[dict[str, Any]]:
        logits = engine.predict(self.encode(table)).predictions
        if self.settings.regression:
            yield from ({"label": float(value)} for value in logits.reshape(-1))
            return
        yield from class_answers(logits, self.settings.labels)


def class_answers(logits: Any, names: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield the best class of each row and the probability of every class."""
    for shares in softmax(logits):
        scores = {str(name): round(float(share), 6) for name, share in zip(names, shares, strict=True)}
        yield {"label": names[int(shares.argmax())], "scores": scores}


def _is_number(label: Any) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return not isinstance(label, bool)


def _numbers(table: Table) -> list[float]:
    wrong = next((index for index, label in enumerate(table["label"]) if not _is_number(label)), None)
    if wrong is not None:
        raise UserError(
            f"{table.at(wrong)}: label {table['label'][wrong]!r} is not a number, as regression needs"
        )
    return [float(label) for label in table["label"]]
