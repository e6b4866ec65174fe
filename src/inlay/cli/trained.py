"""Trained models on disk: an adapter (or a whole model) with everything that evaluate, predict and merge need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import inlay
from inlay.injection.targets import HEADS

from .errors import UserError, told_as
from .files import TASK_FILE, read_json, safetensors_header
from .models import input_limit, load_base, load_config, model_place
from .tasks import FILES, task_class
from .tasks.base import Settings, Task

HEAD_WEIGHTS = tuple(f"{head}{end}.weight" for head in HEADS for end in ("", ".out_proj"))


def save_trained(model: Any, task: Task, folder: Path) -> None:
    """Write the adapter (or the model, for full and head) with everything that evaluate and predict need."""
    with told_as("cannot save the result"):
        model.save_pretrained(folder)
        task.processor.save_pretrained(folder)
        (folder / TASK_FILE).write_text(
            json.dumps(task.settings.to_dict(), indent=2, ensure_ascii=False), encoding="utf-8"
        )


def load_trained(adapter: str | None, model: str | None, dtype: str) -> tuple[Any, Task]:
    """Return a trained model and its task from an adapter folder, or from a whole model folder.

    Raises:
        UserError: the folders are not what they should be.
    """
    if adapter is None and model is None:
        raise UserError(
            "which model? give --adapter FOLDER, or --model FOLDER for a merged or fully trained model"
        )
    place, wanted = Path(adapter or str(model)), "adapter_config.json" if adapter else "config.json"
    if not (place / wanted).is_file():
        raise UserError(
            f"{place} is not {'an adapter' if adapter else 'a model'} folder: it has no {wanted}{_way_out(place)}"
        )
    base = base_of(place, model) if adapter else model_place(str(place))
    revision = read_json(place / wanted).get("revision") if adapter and not model else None
    task = _task_of(place, base, revision)
    loaded, fresh = load_base(base, task, dtype, revision)
    if adapter:
        with told_as(f"cannot load the adapter {place}"):
            loaded = inlay.PeftModel.from_pretrained(loaded, str(place))
    elif fresh:
        raise UserError(f"{place}: the weights of {', '.join(fresh)} are not in its files")
    return loaded, task


def _way_out(place: Path) -> str:
    """Return a hint where the folder is a near miss."""
    inner = next((place / name for name in ("adapter", "model") if (place / name).is_dir()), None)
    if inner is not None:
        return f"; did you mean {inner}?"
    return "; a whole model is given by --model" if (place / "config.json").is_file() else ""


def _task_of(place: Path, base: str, revision: str | None) -> Task:
    """Return the task of a trained model: as noted, else as an adapter's own files tell it."""
    noted = place / TASK_FILE
    settings = Settings.from_dict(read_json(noted)) if noted.is_file() else _guessed_settings(place)
    kind = task_class(settings.task)
    processor = kind.load_processor(str(place), base, revision=revision)
    settings.max_length = settings.max_length or input_limit(None, load_config(base, revision), processor)
    return kind(settings, processor)


def _guessed_settings(place: Path) -> Settings:
    """Return the settings for an adapter that a script has written: its task type, as many labels as its head has rows."""
    file = place / "adapter_config.json"
    task_type = read_json(file).get("task_type") if file.is_file() else None
    names = [name for name in FILES if task_type and task_class(name).task_type == task_type]
    if not names:
        raise UserError(
            f"{place} has no {TASK_FILE} (which 'inlay train' writes) and no known task_type: what it does is unknown"
        )
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
        raise (
            error if override else UserError(f"the base model of {adapter} is gone ({error}); give --model")
        ) from None
