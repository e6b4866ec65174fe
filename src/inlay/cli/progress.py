"""What a training run shows: a bar on a terminal, and one line per log entry."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from .engine import tidy


class LogWhenSaving(TrainerCallback):
    """Logs whenever a checkpoint is saved, so that no logged mean spans a checkpoint: resumed runs then log the same numbers."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save


class Progress(TrainerCallback):
    """Shows training on standard error."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", disable=not sys.stderr.isatty()
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if self.bar is None or not logs or "train_runtime" in logs:
            return  # an evaluation outside of training, or the Trainer's last word on its speed
        evaluation = any(key.startswith("eval_") for key in logs)
        numbers = tidy(logs) if evaluation else {"loss": logs["loss"], "rate": logs["learning_rate"]}
        text = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        tqdm.write(f"epoch {state.epoch:6.2f}  {'eval ' if evaluation else 'train'}  {text}", file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
