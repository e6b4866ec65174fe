"""transformers' Trainer, set up for a task: seeded order, token-exact metrics, quiet progress."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from inlay.training.r_drop import RDropLoss, rdrop_repeat

if TYPE_CHECKING:
    from datasets import Dataset

    from .tasks.base import Task

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class LengthGrouped(Sampler[int]):
    """Random order in which neighbours are about equally long.

    It depends on seed and epoch only, so a resumed run and every process of a distributed one see the same.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class TaskTrainer(Trainer):
    """A Trainer that asks the task how to batch, reduce and measure."""

    def __init__(
        self,
        task: Task,
        model: Any,
        args: TrainingArguments,
        *,
        group_by_length: bool = False,
        r_drop: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.group_by_length = group_by_length
        self.r_drop = None if r_drop is None else DoubledLoss(r_drop, shifted=task.task_type == "CAUSAL_LM")

        def measured(result: Any) -> dict[str, float]:
            return task.measure(result.predictions, result.label_ids)

        super().__init__(
            model=model,
            args=args,
            data_collator=task.collate,
            compute_metrics=measured,
            preprocess_logits_for_metrics=task.reduce,
            processing_class=task.processor,
            **kwargs,
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss: in training with R-Drop, that of every row twice; in evaluation, always the model's own."""
        if self.r_drop is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        doubled = dict(zip(inputs, rdrop_repeat(*inputs.values()), strict=True))
        # By this road the Trainer keeps the labels from the model, and scales for accumulation and several devices.
        self.compute_loss_func = self.r_drop
        try:
            return super().compute_loss(model, doubled, *args, **kwargs)
        finally:
            self.compute_loss_func = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if not self.group_by_length or "input_ids" not in rows.column_names:
            return super()._get_train_sampler(train_dataset)
        lengths = [len(ids) for ids in rows["input_ids"]]
        return LengthGrouped(
            lengths, self.args.train_batch_size * self.args.gradient_accumulation_steps, self.args.seed
        )


class DoubledLoss:
    """R-Drop's loss of a doubled batch's logits; a causal language model's are ``shifted`` by one token from its labels."""

    def __init__(self, alpha: float, *, shifted: bool) -> None:
        self.mean, self.sum, self.shifted = RDropLoss(alpha), RDropLoss(alpha, reduction="sum"), shifted

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"]
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss: torch.Tensor = (self.mean if num_items_in_batch is None else self.sum)(logits, labels)
        return loss if num_items_in_batch is None else loss / num_items_in_batch


def arguments(folder: str, batch_size: int, precision: str, **more: Any) -> TrainingArguments:
    """Return the arguments that every run has in common, and more."""
    common: dict[str, Any] = {
        "output_dir": folder,
        "per_device_eval_batch_size": batch_size,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "report_to": "none",
        "disable_tqdm": True,
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "use_cpu": not torch.accelerator.is_available(),  # else processes of torchrun do not find each other
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return TrainingArguments(**(common | more))


def accepted(model: Any) -> Callable[[Dataset], Dataset]:
    """Return a function that drops the columns which the model's ``forward`` does not take."""
    import inspect

    known = set(inspect.signature(model.forward).parameters) | {"labels"}

    def select(rows: Dataset) -> Dataset:
        return rows.remove_columns([name for name in rows.column_names if name not in known])

    return select


def tidy(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics without the Trainer's prefix and clock; the loss is per token where the task counts tokens."""
    clock = ("epoch", "runtime", "per_second", "preparation_time", "step")
    kept = {key: float(value) for key, value in metrics.items() if not key.endswith(clock)}
    found = {key.removeprefix("eval_").removeprefix("test_"): value for key, value in kept.items()}
    if "token_loss" in found:
        found["loss"] = found.pop("token_loss")
    return found


@dataclass
class Engine:
    """A trained model at work."""

    model: Any
    task: Task
    batch_size: int = 32
    precision: str = "fp32"
    max_new_tokens: int = 64

    def predict(self, rows: Dataset) -> Any:
        """Return predictions, labels and metrics of encoded rows."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        with tempfile.TemporaryDirectory() as folder:
            trainer = TaskTrainer(self.task, self.model, arguments(folder, self.batch_size, self.precision))
            return trainer.predict(accepted(base)(rows))

    def ready(self) -> Any:
        """Return the model on its device, in evaluation mode."""
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        return self.model.to(device).eval()

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Run without gradients, in the chosen precision."""
        device = self.model.device.type
        with (
            torch.inference_mode(),
            torch.autocast(device, DTYPES.get(self.precision), enabled=self.precision in DTYPES),
        ):
            yield


def match_share(generated: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the share of texts that are equal but for white space at their ends."""
    return sum(a.strip() == b.strip() for a, b in zip(generated, wanted, strict=True)) / len(wanted)
