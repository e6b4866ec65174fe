"""Make a base model trainable by a method, or by one of the two baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

import transformers
from torch import nn

import inlay
from inlay.injection.targets import HEADS
from inlay.method import Method, method_by_name

from . import catalogue
from .errors import UserError, told_as
from .options import Train
from .tasks.base import Task


def adapt(model: nn.Module, options: Train, task: Task, fresh: list[str], steps: int) -> nn.Module:
    """Return the model with only those parameters trainable that the method trains.

    Raises:
        UserError: the method's options do not fit the model.
    """
    name = options.method.name
    if name in catalogue.BASELINES:
        return _baseline(model, name, fresh)
    values = catalogue.FIXED.get(name, {}) | options.method.options
    config_class: Any = catalogue.method_configs()[name]
    known = {f.name for f in fields(config_class)}
    if task.task_type is None:  # image classification, whose head no task type names
        fresh = fresh or _heads(model)
    heads = [*(values.pop("modules_to_save", None) or []), *fresh]
    if heads and "modules_to_save" not in known:
        raise UserError(
            f"--method {name} cannot train {', '.join(heads)}, the head of this task, along with it; choose another method, "
            "such as lora"
        )
    if heads:
        values["modules_to_save"] = heads
    if "total_step" in known:
        values.setdefault("total_step", steps)
    with told_as(f"--method {name}"):
        make = config_class.preset if "preset" in values else config_class
        if "preset" in values:
            values["name"] = values.pop("preset")
        config = make(task_type=task.task_type, revision=options.revision, **values)
        _choose_targets(model, config, heads)
        return inlay.get_peft_model(model, config)


def _choose_targets(model: nn.Module, config: Any, heads: Sequence[str]) -> None:
    """Name the layers to adapt where neither the user nor the method's own table for this type of model does."""
    if getattr(config, "target_modules", "") is not None or getattr(config, "target_parameters", None):
        return
    method = cast("Method", method_by_name(config.method_name())())  # input methods have no targets
    if not method.default_targets(config, model, required=False):
        config.target_modules = fallback_targets(model, heads)


def fallback_targets(model: nn.Module, heads: Sequence[str] = ()) -> str | list[str]:
    """Return all linear layers, or all convolutions of a model that has no linear layers besides its head."""
    outside = tuple(f"{head}." for head in (*heads, *HEADS))
    body = {name: module for name, module in model.named_modules() if not f"{name}.".startswith(outside)}
    if any(isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D)) for module in body.values()):
        return "all-linear"
    convolutions = ((name, m) for name, m in body.items() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
    return [name for name, module in convolutions if module.groups == 1]  # depthwise ones hold few numbers


def _baseline(model: nn.Module, name: str, fresh: list[str]) -> nn.Module:
    if name == "head":
        heads = fresh or _heads(model)
        if not heads:
            raise UserError(
                "--method head: the model has no head of its own for this task; choose a method or full"
            )
        model.requires_grad_(False)
        for head in heads:
            model.get_submodule(head).requires_grad_(True)
    return model


def _heads(model: nn.Module) -> list[str]:
    return [head for head in HEADS if hasattr(model, head)]
