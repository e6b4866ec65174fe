"""Checkpoints of what is trained and nothing else, while training goes on.

    {directory}/{prefix}-{epoch}_{step}.safetensors        trained parameters, and buffers that training changed
    {directory}/{prefix}-{epoch}_{step}.optimizer.pt       the optimizer's state, where one is given

Epochs and the steps in them count from 1. Names and retention are those of MindPet's ``TrainableParamsCheckPoint``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..files.folder import write_atomically
from .base_identity import bare, base_identity, digest, lasting_tensors
from .checkpoint_files import METADATA, OPTIMIZER, Saved, load, remove_superfluous, saved_in

BUFFER_VALUES = 1 << 20
"""How many values of a buffer are looked at to see whether it changed."""


class TrainableParamsCheckpoint:
    """Saves what is trained every few steps, and keeps the newest files.

    Give it to transformers' ``Trainer`` as a callback, or call it from a loop of your own::

        checkpoint = TrainableParamsCheckpoint("run", steps_per_epoch=len(loader))
        checkpoint.resume(model, optimizer)    # where an earlier run left off; None at first
        for ...:
            ...
            optimizer.step()
            checkpoint.step(model, optimizer)

    Saved are the parameters that require gradients, and the persistent buffers that differ from what they were at ``begin``
    (all of them, where it was not called), such as the statistics of a BatchNorm. In distributed training, call it in one
    process; sharded parameters cannot be saved.

    Args:
        directory: where to save; made if it is missing.
        prefix: how the files' names begin.
        save_checkpoint_steps: save every so many optimizer steps; the last step of a Trainer's run is saved as well.
        keep_checkpoint_max: keep the newest so many files, 0 for all; by default 5, unless the next one is given.
        keep_checkpoint_per_n_minutes: keep one file of every so many minutes, and the newest.
        steps_per_epoch: optimizer steps in an epoch. A Trainer tells them itself; without them, all is epoch 1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of its range, or two exclude each other.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        prefix: str = "DELTA_CKP",
        *,
        save_checkpoint_steps: int = 1,
        keep_checkpoint_max: int | None = None,
        keep_checkpoint_per_n_minutes: float | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        if directory is None or directory == "":
            raise ValueError("directory is empty: give the folder for the checkpoints")
        if not isinstance(directory, (str, os.PathLike)):
            raise TypeError(f"directory must be a string or a path, not {type(directory).__name__}")
        _check_prefix(prefix)
        _check_number("save_checkpoint_steps", save_checkpoint_steps, 1)
        _check_number("keep_checkpoint_max", keep_checkpoint_max, 0)
        _check_number("steps_per_epoch", steps_per_epoch, 1)
        _check_minutes(keep_checkpoint_per_n_minutes)
        if keep_checkpoint_max is not None and keep_checkpoint_per_n_minutes is not None:
            raise ValueError("give keep_checkpoint_max or keep_checkpoint_per_n_minutes, not both")
        self.directory, self.prefix = Path(directory), prefix
        self.save_steps, self.steps_per_epoch = save_checkpoint_steps, steps_per_epoch
        self.minutes = keep_checkpoint_per_n_minutes
        self.keep = keep_checkpoint_max if keep_checkpoint_max is not None else 0 if self.minutes else 5
        self.steps, self.saved_step = 0, 0
        self._buffers_before: dict[str, bytes] = {}
        self._identity: tuple[frozenset[str], tuple[str, str]] | None = None

    # ------------------------------------------------------------------ in a loop of one's own

    def begin(self, model: nn.Module) -> None:
        """Note the buffers as they are before training, so that those which never change are not saved."""
        newest = self._newest()
        changed = newest.names if newest is not None else frozenset()
        self._buffers_before = {
            name: digest(tensor, BUFFER_VALUES)
            for name, tensor in lasting_tensors(bare(model)).items()
            if not isinstance(tensor, nn.Parameter) and name not in changed
        }

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Path | None:
        """Load the newest checkpoint and go on counting where it was saved; then do as ``begin``.

        Returns:
            The file, or None where there is none.

        Raises:
            FileNotFoundError: the optimizer's state was not saved.
            AdapterFileError: the file does not fit the model or the optimizer; nothing is changed then.
        """
        newest = self._newest()
        if newest is not None:
            load(model, newest.path, optimizer)
            self.steps = self.saved_step = newest.global_step
        self.begin(model)
        return None if newest is None else newest.path

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Path | None:
        """Count one optimizer step, and save where a save is due.

        Returns:
            The file, or None where none was due.
        """
        self.steps += 1
        return self.save(model, optimizer) if self.steps % self.save_steps == 0 else None

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Path:
        """Save now, whether it is due or not; a killed process leaves the whole file or none.

        Returns:
            The file.

        Raises:
            ValueError: nothing is trained.
            OSError: it could not be written; earlier files are as they were.
        """
        model = bare(model)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("no parameter of the model requires a gradient, so there is nothing to save")
        tensors = self._trained(model)
        layout, values = self._base(model, frozenset(tensors))
        per_epoch = self.steps_per_epoch or max(self.steps, 1)
        epoch, step = divmod(max(self.steps, 1) - 1, per_epoch)
        newest = self._newest()
        told = {
            "number": 0 if newest is None else newest.number + 1,
            "global_step": self.steps,
            "base": {"layout": layout, "values": values},
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{self.prefix}-{epoch + 1}_{step + 1}.safetensors"
        if optimizer is not None:
            state = optimizer.state_dict()
            write_atomically(path.with_suffix(OPTIMIZER), lambda target: torch.save(state, target))
        else:
            path.with_suffix(OPTIMIZER).unlink(missing_ok=True)  # of an earlier run
        content = save(tensors, metadata={METADATA: json.dumps(told)})
        write_atomically(path, lambda target: target.write_bytes(content))
        self.saved_step = self.steps
        remove_superfluous(saved_in(self.directory, self.prefix), self.keep, self.minutes)
        return path

    @staticmethod
    def load(
        model: nn.Module,
        path: str | os.PathLike[str],
        optimizer: torch.optim.Optimizer | None = None,
        *,
        check_base: bool = True,
    ) -> None:
        """Put a checkpoint's values into a model with the same base; they are cast to the model's dtypes.

        Args:
            model: a model built as it was for training.
            path: a ``.safetensors`` file of a ``TrainableParamsCheckpoint``.
            optimizer: where its state goes, from the file beside it.
            check_base: refuse a model whose other tensors are not those that it was trained with.

        Raises:
            FileNotFoundError: there is no such file, or none of the optimizer's state.
            AdapterFileError: the file is broken, or does not fit the model or the optimizer; nothing is changed then.
        """
        load(model, Path(path), optimizer, check_base)

    @staticmethod
    def latest(directory: str | os.PathLike[str], prefix: str = "DELTA_CKP") -> Path | None:
        """Return the file that was saved last, or None where there is none."""
        found = saved_in(Path(directory), prefix)
        return found[-1].path if found else None

    # ------------------------------------------------------------------ as a callback of transformers' Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the Trainer's count of steps."""
        self.steps = self.saved_step = state.global_step
        loader: Any = kwargs.get("train_dataloader")
        if self.steps_per_epoch is None and hasattr(loader, "__len__"):
            self.steps_per_epoch = max(1, math.ceil(len(loader) / args.gradient_accumulation_steps))
        self.begin(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save where a save is due, and at the last step."""
        self.steps = state.global_step
        due = self.steps % self.save_steps == 0 or self.steps >= state.max_steps
        if due and state.is_world_process_zero:
            self.save(kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save where training stopped early, unless the Trainer has put another step's values into the model."""
        if self.steps > self.saved_step and state.is_world_process_zero and not args.load_best_model_at_end:
            self.save(kwargs["model"])

    def __getattr__(self, name: str) -> Callable[..., None]:
        # The Trainer calls a method for each of its events, and versions differ in which there are.
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # ------------------------------------------------------------------ what and how many

    def _newest(self) -> Saved | None:
        found = saved_in(self.directory, self.prefix)
        return found[-1] if found else None

    def _trained(self, model: nn.Module) -> dict[str, Tensor]:
        return {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in sorted(lasting_tensors(model).items())
            if self._is_trained(name, tensor)
        }

    def _is_trained(self, name: str, tensor: Tensor) -> bool:
        if isinstance(tensor, nn.Parameter):
            return tensor.requires_grad
        return self._buffers_before.get(name) != digest(tensor, BUFFER_VALUES)

    def _base(self, model: nn.Module, trained: frozenset[str]) -> tuple[str, str]:
        # The rest does not change while it is not trained, so it is looked at once.
        if self._identity is None or self._identity[0] != trained:
            self._identity = (trained, base_identity(model, trained))
        return self._identity[1]


def _check_prefix(prefix: Any) -> None:
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, not {type(prefix).__name__}")
    if not prefix or re.search(r"[/\\\0]", prefix) or prefix.startswith("."):
        raise ValueError(f"prefix must be the beginning of a file's name, not {prefix!r}")


def _check_number(name: str, value: Any, least: int) -> None:
    if value is None and name != "save_checkpoint_steps":
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, not {value}")


def _check_minutes(value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"keep_checkpoint_per_n_minutes must be a number, not {value!r}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"keep_checkpoint_per_n_minutes must be above 0, not {value}")
