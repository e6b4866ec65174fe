"""Text that goes on: plain texts, or prompts with responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

from inlay.arguments import IGNORED

from ..data import Layout, Table
from ..engine import Engine
from ..errors import UserError
from .base import Task
from .generation import generate_texts
from .perplexity import perplexity, token_losses

if TYPE_CHECKING:
    import numpy as np
    import torch


class TheTask(Task):
    """Causal language modelling. With prompts, only the response has a loss."""

    layouts = (Layout(("prompt",), ("response",)), Layout(("text",)))
    auto_class = "AutoModelForCausalLM"
    task_type = "CAUSAL_LM"
    generates = True

    @property
    def metric(self) -> tuple[str, bool]:
        return "perplexity", False

    @property
    def cuts_long_rows(self) -> bool:  # type: ignore[override]
        return "prompt" in self.settings.inputs

    def check_model(self, model: Any) -> None:
        """Refuse encoders that transformers lends a language model's head: they see the token that they are to find.

        Raises:
            UserError: what is put out for a token depends on the next one.
        """
        import torch

        ids = torch.tensor([[0, 0], [0, 1]], device=model.device)
        with torch.no_grad():
            first, second = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0].float()
        if not torch.allclose(first, second, rtol=1e-2, atol=1e-2 * float(first.abs().max()), equal_nan=True):
            raise UserError(
                f"{type(model).__name__} sees the tokens that come later, so it cannot learn to go on with a text; use a "
                'decoder, or set "is_decoder": true in its config.json'
            )

    def encode(self, table: Table) -> Dataset:
        if "prompt" in table:
            pairs = zip(self._prompts(table), self._pieces(table["response"]), strict=True)
            rows = [self._pair(prompt, response) for prompt, response in pairs]
        else:
            texts = [self._closed(ids) for ids in self.processor(table["text"])["input_ids"]]
            texts = [[token for ids in texts for token in ids]] if self.settings.pack else texts
            rows = [(block, block) for ids in texts for block in self._blocks(ids)]
        return Dataset.from_dict({
            "input_ids": [ids for ids, _ in rows],
            "attention_mask": [[1] * len(ids) for ids, _ in rows],
            "labels": [labels for _, labels in rows],
        })  # fmt: skip

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return dict(DataCollatorForSeq2Seq(self.processor)(list(rows)))

    def reduce(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        return token_losses(super().reduce(logits, labels)[:, :-1], labels[:, 1:])

    def measure(self, predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        return perplexity(predicted)

    def answer(self, engine: Engine, table: Table) -> Iterator[dict[str, Any]]:
        starts = (
            self._prompts(table)
            if "prompt" in table
            else [self._opened(ids) for ids in self.processor(table["text"])["input_ids"]]
        )
        for text in generate_texts(engine, self.processor, starts, side="left"):
            yield {"generated": text}

    def _prompts(self, table: Table) -> list[list[int]]:
        texts = [prompt + self.settings.separator for prompt in table["prompt"]]
        return [self._opened(ids) for ids in self.processor(texts)["input_ids"]]

    def _pieces(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self.processor(texts, add_special_tokens=False)["input_ids"]
        return found

    def _opened(self, ids: list[int]) -> list[int]:
        """Return the tokens without a closing one, so that the text can go on."""
        return ids[:-1] if ids and ids[-1] == self.processor.eos_token_id else ids

    def _closed(self, ids: list[int]) -> list[int]:
        end = self.processor.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def _blocks(self, ids: list[int]) -> list[list[int]]:
        size = self.settings.max_length
        return [ids[start : start + size] for start in range(0, len(ids), size)]

    def _pair(self, prompt: list[int], response: list[int]) -> tuple[list[int], list[int]]:
        """Return tokens and labels; of a pair that is too long, the prompt loses its beginning first."""
        answer = self._closed(response)[: self.settings.max_length - 1]
        kept = prompt[-(self.settings.max_length - len(answer)) :]
        return kept + answer, [IGNORED] * len(kept) + answer
