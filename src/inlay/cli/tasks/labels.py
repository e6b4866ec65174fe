"""Names of classes: found in the training rows, looked up in all others, measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..data import Table
from ..errors import UserError, did_you_mean

Label = str | int | float


def label_names(values: Iterable[Label], config: Any) -> list[Label]:
    """Return the distinct labels: in the model's own order where it knows exactly these, else sorted."""
    names = list({str(value): value for value in values}.values())
    known = {str(name): index for index, name in (getattr(config, "id2label", None) or {}).items()}
    if set(known) == {str(name) for name in names}:
        return sorted(names, key=lambda name: int(known[str(name)]))
    return sorted(names, key=lambda name: (isinstance(name, str), name))


def label_ids(table: Table, role: str, names: Sequence[Label]) -> list[int]:
    """Return each row's label as its number.

    Raises:
        UserError: a label that the training rows do not have.
    """
    numbers = {str(name): index for index, name in enumerate(names)}
    return [number_of(value, numbers, table, index) for index, value in enumerate(table[role])]


def number_of(value: Label, numbers: dict[str, int], table: Table, index: int) -> int:
    """Return the number of one label of row ``index``; UserError where the training rows do not have it."""
    if str(value) not in numbers:
        known = list(numbers)
        shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        raise UserError(
            f"{table.at(index)}: unknown label {str(value)!r}{did_you_mean(str(value), known)} (known: {shown})"
        )
    return numbers[str(value)]


def label_arguments(names: Sequence[Label]) -> dict[str, Any]:
    """Return what a model with a head must be told of its classes."""
    words = [str(name) for name in names]
    return {
        "num_labels": len(words),
        "id2label": dict(enumerate(words)),
        "label2id": {word: index for index, word in enumerate(words)},
    }


def class_metrics(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return the accuracy and the mean F1 over the classes that occur in either."""
    scores = []
    for name in np.union1d(predicted, truth):
        both = ((predicted == name) & (truth == name)).sum()
        scores.append(2 * both / ((predicted == name).sum() + (truth == name).sum()))
    return {"accuracy": float((predicted == truth).mean()), "macro_f1": float(np.mean(scores))}


def number_metrics(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return root mean squared error, R2 (1 = perfect, 0 = the mean) and Pearson's correlation."""
    error, spread = ((predicted - truth) ** 2).mean(), truth.var()
    varied = spread > 0 and predicted.var() > 0
    return {
        "rmse": float(np.sqrt(error)),
        "r2": float(1 - error / spread) if spread > 0 else 0.0,
        "pearson": float(np.corrcoef(predicted, truth)[0, 1]) if varied else 0.0,
    }
