"""The contract of a task: the columns it reads, the model class, how rows are encoded, collated, measured and answered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ..data import Layout, Table
from ..errors import told_as
from ..options import Columns, Train

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset

    from ..engine import Engine


@dataclass
class Settings:
    """What a trained model must know of its task; kept beside it as ``inlay_task.json``."""

    task: str
    columns: Columns = field(default_factory=Columns)
    inputs: list[str] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    regression: bool = False
    max_length: int = 512
    separator: str = "\n"
    pack: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Return the settings from JSON values."""
        return cls(**{**values, "columns": Columns(**values["columns"])})


class Task(ABC):
    """One task; holds its settings and the processor (tokenizer or image processor) that prepares inputs."""

    layouts: ClassVar[tuple[Layout, ...]]
    auto_class: ClassVar[str]
    task_type: ClassVar[str | None] = None
    cuts_long_rows: ClassVar[bool] = True
    generates: ClassVar[bool] = False

    def __init__(self, settings: Settings, processor: Any) -> None:
        self.settings, self.processor = settings, processor

    def accepted_layouts(self) -> list[Layout]:
        """Return the forms of data that this model was trained on; all, where that is not known."""
        known = self.settings.inputs
        fitting = [layout for layout in self.layouts if set(layout.inputs) <= set(known)]
        return [Layout(tuple(known), layout.targets) for layout in fitting] or list(self.layouts)

    @property
    @abstractmethod
    def metric(self) -> tuple[str, bool]:
        """The metric that chooses the best checkpoint, and whether more is better."""

    @classmethod
    def settle(cls, settings: Settings, options: Train, table: Table, config: Any) -> Settings:
        """Return the settings completed by what the training rows say, for example the names of the labels."""
        return settings

    @staticmethod
    def load_processor(*places: str, revision: str | None = None) -> Any:
        """Return the tokenizer from the first place that has one, with something to pad with."""
        return load_tokenizer(places, revision)

    def model_arguments(self) -> dict[str, Any]:
        """Return the arguments for ``from_pretrained``."""
        return {}

    def check_model(self, model: Any) -> None:  # noqa: B027 (most tasks have nothing to look at)
        """Look whether a model of the task's class can do the task.

        Raises:
            UserError: it cannot.
        """

    @abstractmethod
    def encode(self, table: Table) -> Dataset:
        """Return the rows as the model's inputs, with ``labels`` where the table has targets."""

    @abstractmethod
    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return a batch, padded to its longest row."""

    def reduce(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Return what ``measure`` needs of one batch's outputs."""
        first: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
        return first

    @abstractmethod
    def measure(self, predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        """Return the metrics of a whole data set from what ``reduce`` gave, and the labels."""

    @abstractmethod
    def answer(self, engine: Engine, table: Table) -> Iterator[dict[str, Any]]:
        """Yield one JSON-able prediction per row, in order."""


def load_tokenizer(places: Sequence[str], revision: str | None) -> Any:
    """Return the tokenizer from the first place that has one; it gets a padding token if it has none.

    Raises:
        UserError: there is no tokenizer.
    """
    from transformers import AutoTokenizer

    with told_as(f"cannot load the tokenizer of {places[-1]}"):
        place = first_with(places, "tokenizer_config.json", "tokenizer.json")
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision)
    if tokenizer.pad_token_id is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def first_with(places: Sequence[str], *names: str) -> str:
    """Return the first place that is a folder with one of these files; the last place without asking."""
    from pathlib import Path

    held = (place for place in places[:-1] if any((Path(place) / name).is_file() for name in names))
    return next(held, places[-1])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities[rows, classes]."""
    import numpy as np

    powers = np.exp(logits - logits.max(-1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(-1, keepdims=True)
    return shares
