"""A class for an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value
from transformers import AutoImageProcessor

from ..data import Layout, Table
from ..engine import Engine
from ..errors import UserError, told_as
from ..options import Train
from .base import Settings, Task, first_with
from .labels import class_metrics, label_arguments, label_ids, label_names
from .text_classification import class_answers


class TheTask(Task):
    """Image classification. Images stay packed until their batch is made."""

    layouts = (Layout(("image",), ("label",)),)
    auto_class = "AutoModelForImageClassification"
    cuts_long_rows = False

    @property
    def metric(self) -> tuple[str, bool]:
        return "accuracy", True

    @classmethod
    def settle(cls, settings: Settings, options: Train, table: Table, config: Any) -> Settings:
        settings.labels = label_names(table["label"], config)
        if len(settings.labels) < 2:
            raise UserError(
                f"{table.source.name}: all rows have the label {str(settings.labels[0])!r}; two classes are needed"
            )
        return settings

    @staticmethod
    def load_processor(*places: str, revision: str | None = None) -> Any:
        with told_as(f"cannot load the image processor of {places[-1]}"):
            return AutoImageProcessor.from_pretrained(
                first_with(places, "preprocessor_config.json"), revision=revision
            )

    def model_arguments(self) -> dict[str, Any]:
        return label_arguments(self.settings.labels)

    def encode(self, table: Table) -> Dataset:
        columns, features = {"pixel_values": table["image"]}, {"pixel_values": Image()}
        if "label" in table:
            columns["labels"] = label_ids(table, "label", self.settings.labels)
            features["labels"] = Value("int64")
        return Dataset.from_dict(columns, features=Features(features))

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        batch = dict(
            self.processor([row["pixel_values"].convert("RGB") for row in rows], return_tensors="pt")
        )
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch

    def measure(self, predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        return class_metrics(predicted.argmax(-1), truth)

    def answer(self, engine: Engine, table: Table) -> Iterator[dict[str, Any]]:
        yield from class_answers(engine.predict(self.encode(table)).predictions, self.settings.labels)
