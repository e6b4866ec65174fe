"""``inlay train``."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed

from inlay.ranks import write_rank_report

from . import catalogue
from .adapt import adapt
from .curves import draw_curves
from .data import Layout, Table, read_table
from .engine import TaskTrainer, accepted, arguments, tidy
from .errors import UserError, did_you_mean, told_as
from .files import is_main_process, new_file, new_folder, write_json
from .models import input_limit, load_base, load_config, model_place
from .options import Train
from .progress import LogWhenSaving, Progress
from .runs import Run, versions
from .tasks import task_class
from .tasks.base import Settings, Task
from .trained import save_trained


def run(options: Train) -> None:
    """Train, evaluate and save.

    Raises:
        UserError: an option, the data or the model does not fit; earlier results are as they were.
    """
    started = time.monotonic()
    if options.learning_rate is None:
        options.learning_rate = catalogue.learning_rate(options.method.name)
    if options.patience is not None and options.eval_data is None:
        raise UserError("--patience counts evaluations: give --eval-data")
    place, here = model_place(options.model), Run(options)
    task, rows = _prepare(options, place)
    trainer = _trainer(options, place, here, task, rows)
    checkpoint = here.begin()
    with _limits_told(here):
        trainer.train(resume_from_checkpoint=checkpoint)
        evaluation = tidy(trainer.evaluate()) if len(rows) > 1 else {}
    if trainer.is_world_process_zero():
        _save(here, task, trainer, evaluation, round(time.monotonic() - started, 1))


@contextmanager
def _limits_told(here: Run) -> Iterator[None]:
    """Turn the ways in which memory and disk run out into one clear line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "out of memory: try a smaller --batch-size with --accumulate, or --gradient-checkpointing"
        ) from error
    except (RuntimeError, SafetensorError) as error:
        if "inline_container" not in str(error) and "No space left" not in str(
            error
        ):  # torch.save, safetensors
            raise
        raise UserError(
            f"no space left for checkpoints in {here.checkpoints}; make some and go on with --resume"
        ) from error


def _prepare(options: Train, place: str) -> tuple[Task, list[Dataset]]:
    """Return the task and the encoded rows: training, and evaluation if there is one."""
    kind = task_class(options.task)
    first = read_table(options.train_data, kind.layouts, options.columns, split="train")
    same = Layout(tuple(first.inputs), first.layout.targets)
    more = [] if options.eval_data is None else [read_table(options.eval_data, [same], options.columns)]
    config = load_config(place, options.revision)
    processor = kind.load_processor(place, revision=options.revision)
    settings = Settings(
        options.task, options.columns, first.inputs,
        max_length=input_limit(options.max_length, config, processor), separator=options.separator, pack=options.pack,
    )  # fmt: skip
    task = kind(kind.settle(settings, options, first, config), processor)
    _check_r_drop(options, task)
    rows = [task.encode(table) for table in (first, *more)]
    if task.cuts_long_rows and is_main_process():
        _tell_cut_rows(first, rows[0], settings.max_length)
    return task, rows


def _check_r_drop(options: Train, task: Task) -> None:
    if options.r_drop is None:
        return
    if task.settings.regression or options.task == "seq2seq":
        what = "regression" if task.settings.regression else options.task
        raise UserError(f"--r-drop compares distributions over classes and is not for {what}; leave it out")
    if options.trainer.get("label_smoothing_factor"):
        raise UserError("--r-drop has a loss of its own: leave out --trainer.label_smoothing_factor")


def _check_dropout(options: Train, model: torch.nn.Module) -> None:
    """Refuse R-Drop where its two passes would be the same, and nothing would tell."""
    if options.r_drop is None:
        return
    for module in model.modules():
        drops = isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0
        if drops or any("drop" in key and isinstance(v, float) and v > 0 for key, v in vars(module).items()):
            return
    raise UserError(
        "--r-drop compares passes with different dropout, and this model has none; set the method's own, as"
        " --method.lora-dropout 0.1"
    )


def _tell_cut_rows(table: Table, rows: Dataset, limit: int) -> None:
    full = sum(len(ids) >= limit for ids in rows["input_ids"])
    if full:
        print(
            f"{full} of {len(table)} training rows reach --max-length {limit} and are cut there",
            file=sys.stderr,
        )


def _trainer(options: Train, place: str, here: Run, task: Task, rows: list[Dataset]) -> TaskTrainer:
    set_seed(options.seed)  # before the new head and the adapter get their values
    exact = options.method.name in catalogue.BASELINES and options.dtype == "auto"
    base, fresh = load_base(place, task, "float32" if exact else options.dtype, options.revision)
    select = accepted(base)
    steps = _steps(options, len(rows[0]))
    args = _arguments(options, task, here, steps, evaluated=len(rows) > 1)
    model = adapt(base, options, task, fresh, steps)
    _check_dropout(options, model)
    _announce(options, model, rows, steps)
    stopping = [] if options.patience is None else [EarlyStoppingCallback(options.patience)]
    return TaskTrainer(
        task, model, args, group_by_length=options.group_by_length, r_drop=options.r_drop,
        callbacks=[LogWhenSaving(), Progress(), *stopping],
        train_dataset=select(rows[0]), eval_dataset=select(rows[1]) if len(rows) > 1 else None,
    )  # fmt: skip


def _steps(options: Train, rows: int) -> int:
    """Return the number of optimiser steps of the whole run."""
    if options.max_steps is not None:
        return int(options.max_steps)
    together: int = options.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    updates: int = math.ceil(math.ceil(rows / together) / options.accumulate)
    return math.ceil(float(options.epochs) * updates)


def _arguments(options: Train, task: Task, here: Run, steps: int, *, evaluated: bool) -> TrainingArguments:
    when = "epoch" if options.eval_steps is None else "steps"
    metric, more_is_better = task.metric
    chosen: dict[str, Any] = {
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps or -1,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulate,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": options.schedule,
        "warmup_steps": round(options.warmup * steps),
        "weight_decay": options.weight_decay,
        "gradient_checkpointing": options.gradient_checkpointing,
        "dataloader_num_workers": options.workers,
        "seed": options.seed,
        "logging_steps": max(1, steps // 20),
        "save_strategy": when,
        "eval_strategy": when if evaluated else "no",
        "save_total_limit": 1,
        "load_best_model_at_end": evaluated,
        "metric_for_best_model": f"eval_{metric}" if evaluated else None,
        "greater_is_better": more_is_better if evaluated else None,
        "restore_callback_states_from_checkpoint": True,
    }
    if options.eval_steps is not None:
        chosen |= {"eval_steps": options.eval_steps, "save_steps": options.eval_steps}
    known = {f.name for f in fields(TrainingArguments) if f.init}
    for name in options.trainer:
        if name not in known:
            raise UserError(
                f"--trainer.{name} is not an argument of transformers.TrainingArguments{did_you_mean(name, known)}"
            )
    with told_as("the training options"):
        return arguments(
            str(here.checkpoints), options.eval_batch_size, options.precision, **(chosen | options.trainer)
        )


def _counts(model: Any) -> dict[str, float]:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return {"trainable": trainable, "total": total, "percent": round(100 * trainable / total, 4)}


def _announce(options: Train, model: Any, rows: list[Dataset], steps: int) -> None:
    if is_main_process():
        counts = _counts(model)
        print(
            f"{options.method.name}: trains {counts['trainable']:,} of {counts['total']:,} parameters"
            f" ({counts['percent']:.4g} %);"
            f" {' + '.join(f'{len(part):,}' for part in rows)} rows, {steps:,} steps, learning rate {options.learning_rate:g}",
            file=sys.stderr,
        )


def _save(here: Run, task: Task, trainer: TaskTrainer, evaluation: dict[str, float], seconds: float) -> None:
    whole = here.options.method.name in catalogue.BASELINES
    place, other = here.folder / "adapter", here.folder / "model"
    if whole:
        place, other = other, place
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    with new_folder(place) as folder:
        save_trained(model, task, folder)
    size = sum(path.stat().st_size for path in place.glob("*.safetensors"))
    with new_file(here.folder / "curves.png") as path:
        draw_curves(trainer.state.log_history, task.metric[0], path)
    if not whole and model.stepping_adapters():
        write_rank_report(model, here.folder)
    here.write_options(here.folder / "config.yaml")
    report = _report(here.options, trainer, evaluation) | {"bytes": size, "seconds": seconds}
    write_json(here.folder / "metrics.json", report | {"versions": versions()})
    shutil.rmtree(other, ignore_errors=True)  # of an overwritten run
    shown = "  ".join(f"{key} {value:.4g}" for key, value in evaluation.items())
    print(f"{shown or 'no evaluation'}\n{place}  ({size / 1e6:.2f} MB)")


def _report(options: Train, trainer: TaskTrainer, evaluation: dict[str, float]) -> dict[str, Any]:
    state = trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return {
        "task": options.task,
        "model": options.model,
        "method": options.method.name,
        "eval": evaluation,
        "train": {
            "loss": losses[-1] if losses else None,
            "steps": state.global_step,
            "epochs": round(state.epoch or 0.0, 4),
            "best_step": state.best_global_step if evaluation else None,
            "learning_rate": options.learning_rate,
            "seed": options.seed,
        },
        "parameters": _counts(trainer.model),
    }
