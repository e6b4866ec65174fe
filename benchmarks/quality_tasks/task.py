"""What a task is: data, a pretrained model, a loss, a score, and how long to train."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

Example = Any
Batch = dict[str, Tensor]
SPLITS = ("train", "dev", "test")
NOT_SETTINGS = ("name", "title", "metric", "lower_is_better", "rates", "bound", "control")
"""Fields of a task that do not change what a run finds."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One pretrained model and one data set.

    Args:
        name: what ``--tasks`` calls it.
        title: one line for the report.
        metric: what ``score`` returns.
        lower_is_better: whether the metric is a loss.
        steps, batch_size: length of the training, the same for every method.
        rank, alpha: of the low-rank methods.
        targets: the modules they adapt, as ``target_modules`` names them.
        head: modules that the method "head" trains.
        new_head: whether the head is new, so that every method trains it and adapters save it.
        task_type: as in ``LoraConfig``.
        rates: learning rates to try, by family of methods: "full", "head", "adapter", "wide", "prompt".
        bound: a split and the score on it that a run with PEFT reached; a goal of its own.
        control: whether the adapter is also trained on the same architecture with random weights.
        most: examples used of a split; all where it is not named.
        pool: batches whose examples are sorted by length together, so that less is padded; 1 leaves the order to chance.
    """

    name: str
    title: str
    metric: str
    lower_is_better: bool = False
    steps: int
    batch_size: int
    rank: int = 8
    alpha: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    head: tuple[str, ...] = ("classifier",)
    new_head: bool = True
    task_type: str | None = None
    rates: Mapping[str, Sequence[float]]
    bound: tuple[str, float] | None = None
    control: bool = False
    most: Mapping[str, int] = field(default_factory=dict)
    pool: int = 2

    @property
    def encoder_classifies(self) -> bool:
        """Whether an encoder of text tells classes apart."""
        return False

    def missing(self, shared: Path) -> str | None:
        """Return what this machine lacks for the task, or None."""
        absent = [folder for folder in self.folders() if not (shared / folder).is_dir()]
        return f"{shared / absent[0]} is not there" if absent else None

    def folders(self) -> tuple[str, ...]:
        """Return the folders with data and models that the task reads, below the shared folder."""
        return ()

    @abstractmethod
    def examples(self, shared: Path) -> dict[str, list[Example]]:
        """Return the examples of each of ``SPLITS``."""

    @abstractmethod
    def model(self, shared: Path, pretrained: bool) -> nn.Module:
        """Return the base model with a head for the task; with random weights unless ``pretrained``."""

    @abstractmethod
    def batch(self, examples: Sequence[Example]) -> Batch:
        """Return the tensors of several examples."""

    @abstractmethod
    def score(self, model: nn.Module, batches: Sequence[Batch]) -> float:
        """Return the metric over all batches of a split."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the training loss of one batch, 0-d."""
        loss: Tensor = model(**batch).loss
        return loss

    def length(self, example: Example) -> int:
        """Return the number of tokens by which examples are grouped; equal lengths are not grouped."""
        return 0

    def settings(self) -> dict[str, Any]:
        """Return what two runs must share to be comparable, as JSON keeps it."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NOT_SETTINGS}
        settings: dict[str, Any] = json.loads(json.dumps(values))
        return settings

    def better(self, score: float, other: float) -> bool:
        """Return whether a score is better than another."""
        return score < other if self.lower_is_better else score > other

    def trial(self) -> Task:
        """Return the shorter training by which learning rates are chosen."""
        return replace(self, steps=max(1, self.steps // 3))
