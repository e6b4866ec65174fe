"""The files of ``TrainableParamsCheckpoint``: which there are, which go, and loading one whole or not at all."""

from __future__ import annotations

import difflib
import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import AdapterFileError
from .base_identity import bare, base_identity, lasting_tensors

OPTIMIZER = ".optimizer.pt"
METADATA = "inlay_checkpoint"
"""The only key of a file's metadata; it holds JSON, since the order of several keys differs from save to save."""


@dataclass(frozen=True)
class Saved:
    """One checkpoint on disk.

    Attributes:
        path: its file.
        number: how many were saved before it in this folder; the order of saving, whatever became of the files' dates.
        global_step: optimizer steps before it.
        names: the tensors in it.
        base: digests of the layout and the values of the base.
    """

    path: Path
    number: int
    global_step: int
    names: frozenset[str]
    base: tuple[str, str]


def saved_in(directory: Path, prefix: str) -> list[Saved]:
    """Return the checkpoints in a folder in the order they were saved. Files of others are passed over."""
    name = re.compile(rf"{re.escape(prefix)}-\d+_\d+\.safetensors")
    found = []
    for path in directory.glob("*.safetensors") if directory.is_dir() else ():
        if name.fullmatch(path.name):
            try:
                found.append(read_saved(path))
            except AdapterFileError:
                continue
    return sorted(found, key=lambda saved: saved.number)


def remove_superfluous(found: list[Saved], newest: int, minutes: float | None) -> None:
    """Remove all but the newest so many files (0: none), or all but one of every so many minutes and the newest."""
    if minutes is not None:
        kept = _spread([saved.path.stat().st_mtime for saved in found], 60 * minutes)
        superfluous = [saved for place, saved in enumerate(found) if place not in kept]
    else:
        superfluous = found[:-newest] if newest else []
    for saved in superfluous:
        saved.path.unlink(missing_ok=True)
        saved.path.with_suffix(OPTIMIZER).unlink(missing_ok=True)


def _spread(times: list[float], apart: float) -> set[int]:
    """Return the places of the first time, of each that is so much later than the one kept before, and of the last."""
    kept: list[int] = []
    for place, time in enumerate(times):
        if not kept or time - times[kept[-1]] >= apart:
            kept.append(place)
    return {*kept, len(times) - 1}


def read_saved(path: Path) -> Saved:
    """Return what a file says of itself.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFileError: it is broken, or no checkpoint of ``TrainableParamsCheckpoint``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            told, names = json.loads((file.metadata() or {})[METADATA]), frozenset(file.keys())
        base = (told["base"]["layout"], told["base"]["values"])
        return Saved(path, told["number"], told["global_step"], names, base)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path} cannot be read ({error}); it may be truncated") from error
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path} was not saved by TrainableParamsCheckpoint") from error


def load(
    model: nn.Module, path: Path, optimizer: torch.optim.Optimizer | None = None, check_base: bool = True
) -> None:
    """Put a checkpoint's values into a model, and its optimizer's state into the optimizer.

    Raises:
        FileNotFoundError: there is no such file, or none of the optimizer's state.
        AdapterFileError: a file is broken, or does not fit; nothing is changed then.
    """
    model = bare(model)
    saved, present = read_saved(path), lasting_tensors(model)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(saved.names)}
    _check_tensors(path, tensors, present)
    if check_base:
        _check_base(saved, model)
    if optimizer is not None:
        _load_optimizer(path.with_suffix(OPTIMIZER), optimizer)
    with torch.no_grad():
        for name, tensor in tensors.items():
            present[name].copy_(tensor)


def _check_tensors(path: Path, tensors: dict[str, Tensor], present: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name not in present:
            near = difflib.get_close_matches(name, present, n=1)
            raise AdapterFileError(
                f"{path} holds {name!r}, which the model lacks{f' (it has {near[0]!r})' if near else ''}; "
                "build the model, with its adapters and head, as it was for training"
            )
        if present[name].is_meta:
            raise AdapterFileError(
                f"{name!r} is on the meta device and takes no values; load the model's weights first"
            )
        if tensor.shape != present[name].shape:
            raise AdapterFileError(
                f"{path} holds {name!r} of shape {list(tensor.shape)}; the model's is {list(present[name].shape)}"
            )


def _check_base(saved: Saved, model: nn.Module) -> None:
    layout, values = base_identity(model, saved.names)
    if layout != saved.base[0]:
        raise AdapterFileError(
            f"{saved.path} was trained on another base: the tensors that it does not hold differ in name, shape or dtype from "
            "the model's; build the model as it was for training, or pass check_base=False"
        )
    if values != saved.base[1]:
        raise AdapterFileError(
            f"{saved.path} was trained on another base: names and shapes are the model's, but frozen values differ; "
            "load the weights it was trained with, or pass check_base=False"
        )


def _load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no optimizer's state {path}; it is saved where save() or step() is given one"
        )
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise AdapterFileError(
            f"{path} cannot be read as an optimizer's state; it may be truncated"
        ) from error
    _check_moments(path, state, optimizer)
    optimizer.load_state_dict(state)


def _check_moments(path: Path, state: Any, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a state whose groups or moments have other shapes than the optimizer's parameters, which PyTorch lets pass."""
    groups = optimizer.param_groups
    try:
        sizes = [len(group["params"]) for group in state["param_groups"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
    except (KeyError, TypeError) as error:
        raise AdapterFileError(f"{path} holds no optimizer's state") from error
    if sizes != [len(group["params"]) for group in groups]:
        raise AdapterFileError(
            f"{path} is of an optimizer with groups of {sizes} parameters, not {[len(g['params']) for g in groups]}"
        )
    parameters = [p for group in groups for p in group["params"]]
    for number, p in zip(numbers, parameters, strict=True):
        for key, value in state["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != p.shape:
                raise AdapterFileError(
                    f"{path}: {key} of parameter {number} has shape {list(value.shape)}, the parameter {list(p.shape)}"
                )
