"""Models on the command line: a base with the head its task needs, adapted, saved and loaded again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import inlay

from . import catalogue
from .errors import UserError, told_as
from .files import TASK_FILE, read_json, safetensors_header
from .options import Train
from .tasks import FILES, task_class
from .tasks.base import Settings, Task

transformers.utils.logging.disable_progress_bar()  # of loading weights; training has its own
HEADS = ("classifier", "score")
HEAD_WEIGHTS = tuple(f"{head}{end}.weight" for head in HEADS for end in ("", ".out_proj"))
LENGTH_LIMIT = 512


def model_place(name: str) -> str:
    """Return a local folder's full path, or the hub id as it is.

    Raises:
        UserError: a path that is no folder with a model.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name} is not a model folder: it has no config.json")
        return str(path.resolve())
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UserError(f"{name}: no such model folder")
    return name


def load_config(place: str, revision: str | None) -> Any:
    """Return a model's configuration."""
    with told_as(f"cannot load the model {place!r}{'' if Path(place).is_dir() else ' (no folder of this name, so taken as a hub id)'}"):
        return transformers.AutoConfig.from_pretrained(place, revision=revision)


def input_limit(asked: int | None, config: Any, tokenizer: Any) -> int:
    """Return the longest input in tokens: as asked, else what the model can take, at most 512.

    Raises:
        UserError: the model cannot take what was asked.
    """
    positions = getattr(config, "max_position_embeddings", None)
    limit = min(getattr(tokenizer, "model_max_length", LENGTH_LIMIT), positions or 10**9)
    if asked is not None and positions is not None and asked > positions:
        raise UserError(f"--max-length {asked}: the model has {positions} positions")
    return asked or min(LENGTH_LIMIT, limit)


def load_base(place: str, task: Task, dtype: str, revision: str | None = None) -> tuple[Any, list[str]]:
    """Return a model with the task's head, and the names of its modules that the files do not hold and that must be trained.

    Raises:
        UserError: the files cannot be loaded, or they are not of such a model.
    """
    loader = getattr(transformers, task.auto_class)
    with told_as(f"cannot load {place!r} for {task.settings.task}"):
        model, info = loader.from_pretrained(
            place, revision=revision, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **task.model_arguments()
        )
    if getattr(model.config, "pad_token_id", 0) is None:
        model.config.pad_token_id = getattr(task.processor, "pad_token_id", None)
    absent = set(info["missing_keys"]) | {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    names = [name for name, _ in model.named_parameters()]
    fresh = [name for name in names if name in absent]
    if 2 * len(fresh) > len(names):
        raise UserError(f"{place}: {len(fresh)} of {len(names)} weights of {type(model).__name__} are not in its files: not such a model")
    return model, _whole_modules(names, set(fresh))


def _whole_modules(names: list[str], fresh: set[str]) -> list[str]:
    """Return the largest modules all of whose parameters are fresh."""
    found = set()
    for name in fresh:
        module = name.rpartition(".")[0]
        while (parent := module.rpartition(".")[0]) and all(n in fresh for n in names if n.startswith(f"{parent}.")):
            module = parent
        found.add(module)
    return sorted(found)


def adapt(model: nn.Module, options: Train, task: Task, fresh: list[str], steps: int) -> nn.Module:
    """Return the model with only those parameters trainable that the method trains.

    Raises:
        UserError: the method's options do not fit the model.
    """
    name = options.method.name
    if name in catalogue.BASELINES:
        return _baseline(model, name, fresh)
    values = catalogue.FIXED.get(name, {}) | options.method.options
    config_class = catalogue.method_configs()[name]
    known = {f.name for f in fields(config_class)}
    heads = [*(values.pop("modules_to_save", None) or []), *fresh]
    if heads:
        values["modules_to_save"] = heads
    if "total_step" in known:
        values.setdefault("total_step", steps)
    with told_as(f"--method {name}"):
        config = config_class(task_type=task.task_type, revision=options.revision, **values)
        return _with_adapter(model, config, heads)


def _with_adapter(model: nn.Module, config: Any, heads: list[str]) -> nn.Module:
    try:
        return inlay.get_peft_model(model, config)
    except ValueError as error:
        if getattr(config, "target_modules", "") is not None or "specify `target_modules`" not in str(error):
            raise
        config.target_modules = fallback_targets(model, heads)  # a model type without a usual choice
        return inlay.get_peft_model(model, config)


def fallback_targets(model: nn.Module, heads: Sequence[str] = ()) -> str | list[str]:
    """Return all linear layers, or all convolutions of a model that has no linear layers besides its head."""
    body = {name: module for name, module in model.named_modules() if name not in {*heads, *HEADS}}
    if any(isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D)) for module in body.values()):
        return "all-linear"
    convolutions = {name: module for name, module in body.items() if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))}
    return [name for name, module in convolutions.items() if module.groups == 1]  # depthwise ones hold few numbers


def _baseline(model: nn.Module, name: str, fresh: list[str]) -> nn.Module:
    if name == "head":
        heads = fresh or [head for head in HEADS if hasattr(model, head)]
        if not heads:
            raise UserError("--method head: the model has no head of its own for this task; choose a method or full")
        model.requires_grad_(False)
        for head in heads:
            model.get_submodule(head).requires_grad_(True)
    return model


def save_trained(model: Any, task: Task, folder: Path) -> None:
    """Write the adapter (or the model, for full and head) with everything that evaluate and predict need."""
    with told_as("cannot save the result"):
        model.save_pretrained(folder)
        task.processor.save_pretrained(folder)
        (folder / TASK_FILE).write_text(json.dumps(task.settings.to_dict(), indent=2, ensure_ascii=False), encoding="utf-8")


def load_trained(adapter: str | None, model: str | None, dtype: str) -> tuple[Any, Task]:
    """Return a trained model and its task from an adapter folder, or from a whole model folder.

    Raises:
        UserError: the folders are not what they should be.
    """
    if adapter is None and model is None:
        raise UserError("which model? give --adapter FOLDER, or --model FOLDER for a merged or fully trained model")
    place, wanted = Path(adapter or str(model)), "adapter_config.json" if adapter else "config.json"
    if not (place / wanted).is_file():
        raise UserError(f"{place} is not {'an adapter' if adapter else 'a model'} folder: it has no {wanted}")
    base = base_of(place, model) if adapter else model_place(str(place))
    task = _task_of(place, base)
    loaded, fresh = load_base(base, task, dtype)
    if adapter:
        with told_as(f"cannot load the adapter {place}"):
            loaded = inlay.PeftModel.from_pretrained(loaded, str(place))
    elif fresh:
        raise UserError(f"{place}: the weights of {', '.join(fresh)} are not in its files")
    return loaded, task


def _task_of(place: Path, base: str) -> Task:
    """Return the task of a trained model: as noted, else as an adapter's own files tell it."""
    if (place / TASK_FILE).is_file():
        settings = Settings.from_dict(read_json(place / TASK_FILE))
    else:
        settings = _guessed_settings(place)
    kind = task_class(settings.task)
    processor = kind.load_processor(str(place), base)
    settings.max_length = settings.max_length or input_limit(None, load_config(base, None), processor)
    return kind(settings, processor)


def _guessed_settings(place: Path) -> Settings:
    """Return the settings for an adapter that a script has written: its task type, and as many labels as its head has rows."""
    config = read_json(place / "adapter_config.json") if (place / "adapter_config.json").is_file() else {}
    names = [name for name in FILES if task_class(name).task_type == config.get("task_type")] if config.get("task_type") else []
    if not names:
        raise UserError(f"{place} has no {TASK_FILE} and no known task_type, so what it does is unknown; 'inlay train' writes that file")
    heads = [entry["shape"] for key, entry in safetensors_header(place).items() if key.endswith(HEAD_WEIGHTS)]
    return Settings(names[0], labels=list(range(heads[0][0])) if heads else [], max_length=0)


def base_of(adapter: Path, override: str | None) -> str:
    """Return where an adapter's base model is."""
    recorded = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not override and not recorded:
        raise UserError(f"{adapter} does not record its base model: give --model")
    try:
        return model_place(override or recorded)
    except UserError as error:
        raise error if override else UserError(f"the base model of {adapter} is gone ({error}); give --model") from None
