"""Base models: where they are, how long their inputs may be, and the model with the head that a task needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from .errors import UserError, told_as
from .tasks.base import Task

transformers.utils.logging.disable_progress_bar()  # of loading weights; training has its own
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
    with told_as(
        f"cannot load the model {place!r}{'' if Path(place).is_dir() else ' (no folder of this name, so taken as a hub id)'}"
    ):
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
            place,
            revision=revision,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **task.model_arguments(),
        )
    if getattr(model.config, "pad_token_id", 0) is None:
        model.config.pad_token_id = getattr(task.processor, "pad_token_id", None)
    absent = set(info["missing_keys"]) | {
        key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]
    }
    names = [name for name, _ in model.named_parameters()]
    fresh = [name for name in names if name in absent]
    if 2 * len(fresh) > len(names):
        raise UserError(
            f"{place}: {len(fresh)} of {len(names)} weights of {type(model).__name__} are not in its files: not such a model"
        )
    task.check_model(model)
    return model, _whole_modules(names, set(fresh))


def _whole_modules(names: list[str], fresh: set[str]) -> list[str]:
    """Return the largest modules all of whose parameters are fresh."""

    def is_fresh(module: str) -> bool:
        return module != "" and all(name in fresh for name in names if name.startswith(f"{module}."))

    found = set()
    for name in fresh:
        module = name.rpartition(".")[0]
        while is_fresh(parent := module.rpartition(".")[0]):
            module = parent
        found.add(module)
    return sorted(found)
