"""A tag for each word: names, parts of speech."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForTokenClassification

from inlay.arguments import IGNORED

from ..data import Layout, Table
from ..engine import Engine
from ..errors import UserError
from ..options import Train
from .base import Settings, Task
from .entities import entity_metrics
from .labels import class_metrics, label_arguments, label_names, number_of


class TheTask(Task):
    """Token classification. A word's tag is read at its first piece; the other pieces have no loss."""

    layouts = (Layout(("tokens",), ("tags",)),)
    auto_class = "AutoModelForTokenClassification"
    task_type = "TOKEN_CLS"

    @property
    def metric(self) -> tuple[str, bool]:
        return ("f1" if self._entities else "accuracy"), True

    @property
    def _entities(self) -> bool:
        return any(str(name).startswith("B-") for name in self.settings.labels)

    @classmethod
    def settle(cls, settings: Settings, options: Train, table: Table, config: Any) -> Settings:
        settings.labels = label_names(chain.from_iterable(table["tags"]), config)
        return settings

    @staticmethod
    def load_processor(*places: str, revision: str | None = None) -> Any:
        tokenizer = Task.load_processor(*places, revision=revision)
        if not tokenizer.is_fast:
            raise UserError(
                f"{places[-1]}: token-classification needs a fast tokenizer (tokenizer.json), which knows words from pieces"
            )
        if (
            getattr(tokenizer, "add_prefix_space", None) is False
        ):  # byte-level tokenizers want words with their blank
            tokenizer = type(tokenizer).from_pretrained(
                tokenizer.name_or_path, add_prefix_space=True, revision=revision
            )
        return tokenizer

    def model_arguments(self) -> dict[str, Any]:
        return label_arguments(self.settings.labels)

    def encode(self, table: Table) -> Dataset:
        pieces = self.processor(
            table["tokens"], is_split_into_words=True, truncation=True, max_length=self.settings.max_length
        )
        numbers = {str(name): index for index, name in enumerate(self.settings.labels)}
        labels = []
        for index, tokens in enumerate(table["tokens"]):
            tags = [0] * len(tokens)  # without targets, the place alone counts
            if "tags" in table:
                if len(table["tags"][index]) != len(tokens):
                    raise UserError(
                        f"{table.at(index)}: {len(tokens)} tokens, but {len(table['tags'][index])} tags"
                    )
                tags = [number_of(tag, numbers, table, index) for tag in table["tags"][index]]
            words = _first_pieces(pieces.word_ids(index))
            labels.append([IGNORED if word is None else tags[word] for word in words])
        return Dataset.from_dict(dict(pieces) | {"labels": labels})

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return dict(DataCollatorForTokenClassification(self.processor)(list(rows)))

    def measure(self, predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        read, chosen = truth != IGNORED, predicted.argmax(-1)
        accuracy = class_metrics(chosen[read], truth[read])
        if not self._entities:
            return accuracy
        names = [str(name) for name in self.settings.labels]
        rows = zip(chosen, truth, read, strict=True)
        tagged = (([names[n] for n in ours[r]], [names[n] for n in theirs[r]]) for ours, theirs, r in rows)
        return entity_metrics(tagged) | {"accuracy": accuracy["accuracy"]}

    def answer(self, engine: Engine, table: Table) -> Iterator[dict[str, Any]]:
        result = engine.predict(self.encode(table))
        pieces = self.processor(
            table["tokens"], is_split_into_words=True, truncation=True, max_length=self.settings.max_length
        )
        unread = (
            "O" if "O" in self.settings.labels else None
        )  # beyond max_length, or a word without any piece
        for index, tokens in enumerate(table["tokens"]):
            words = [word for word in _first_pieces(pieces.word_ids(index)) if word is not None]
            chosen = result.predictions[index].argmax(-1)[result.label_ids[index] != IGNORED]
            tags: list[Any] = [unread] * len(tokens)
            for word, number in zip(words, chosen, strict=True):
                tags[word] = self.settings.labels[int(number)]
            yield {"tags": tags}


def _first_pieces(word_ids: Sequence[int | None]) -> list[int | None]:
    """Return each piece's word where it is the word's first piece, else None."""
    before = [None, *word_ids[:-1]]
    return [None if word == previous else word for word, previous in zip(word_ids, before, strict=True)]
