"""The methods as the command line knows them: names, options, learning rates."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from .errors import UserError, did_you_mean, one_line, told_as

BASELINES = {
    "full": "train all weights of the model: the expensive yardstick",
    "head": "train only the new head on the frozen model: the cheap yardstick",
}
FIXED: dict[str, dict[str, Any]] = {"dora": {"use_dora": True}}
"""Options that make a method out of another method's configuration."""
OTHER_NAMES = {
    "p-tuning-v2": (
        "PREFIX_TUNING",
        "P-Tuning v2: a prefix on every layer, also of encoders with a head. Liu et al. 2022, https://arxiv.org/abs/2110.07602.",
    )
}
"""Names of a registered method in another paper, and what it says there."""

SET_BY_THE_RUN = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
}  # fmt: skip

LEARNING_RATES = {
    "full": 5e-5, "head": 1e-3, "prompt-tuning": 1e-1, "p-tuning": 1e-2, "prefix-tuning": 1e-2, "p-tuning-v2": 1e-2,
}  # fmt: skip
ADAPTERS = 1e-3


def learning_rate(method: str) -> float:
    """Return the default peak learning rate of a method.

    Adapters start as the identity and are few, so they bear a far higher rate than the weights themselves. LoRA on MiniLM
    and TREC, 174 steps: accuracy 0.37 with 5e-4, 0.88 with 1e-3, 0.92 with 2e-3; larger models want the lower end. Prompts
    want more, there in 157 steps: prefix tuning 0.23 with 1e-3, 0.88 with 1e-2; prompt tuning 0.91 with 1e-1; P-tuning 0.55
    with 1e-2, the one rate that was tried.
    """
    return LEARNING_RATES.get(method, ADAPTERS)


def method_configs() -> dict[str, type]:
    """Return the configuration class of every method that stands alone, by its name on the command line."""
    from inlay.method import METHODS, load_built_in

    load_built_in()
    configs: dict[str, type] = {
        name.lower().replace("_", "-"): method.config
        for name, method in METHODS.items()
        if not getattr(method, "mixes", False)
    }
    return configs | {name: METHODS[method].config for name, (method, _) in OTHER_NAMES.items()}


def check_method(name: str) -> None:
    """Raise UserError unless the command line knows the method."""
    known = [*method_configs(), *BASELINES]
    if name not in known:
        raise UserError(f"unknown method {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})")


def own_options(name: str) -> list[Field[Any]]:
    """Return the fields of a method's configuration that a user may set."""
    config = method_configs().get(name)
    if config is None:
        return []
    hidden = SET_BY_THE_RUN | set(getattr(config, "not_implemented", ())) | set(FIXED.get(name, ()))
    return [f for f in fields(config) if f.init and f.name not in hidden]


def default_of(f: Field[Any]) -> Any:
    """Return a field's default value."""
    return f.default_factory() if f.default_factory is not MISSING else f.default


def preset_names(name: str) -> list[str]:
    """Return the presets of a method by their names, other names included; none for a method that has no presets."""
    config: Any = method_configs()[name]
    return sorted(config.preset_names()) if hasattr(config, "preset_names") else []


def preset_options(name: str, preset: str) -> dict[str, Any]:
    """Return what a preset of a method sets its options to; nothing for a method without presets.

    Raises:
        UserError: the method has no such preset.
    """
    config: Any = method_configs()[name]
    if not preset or not preset_names(name):
        return {}
    with told_as("--method"):
        fields_of_it: dict[str, Any] = config.preset_fields(preset)
    return fields_of_it


def option_types(name: str) -> dict[str, Any]:
    """Return the type of each field of a method's configuration."""
    return typing.get_type_hints(method_configs()[name])


def option_help(name: str) -> dict[str, str]:
    """Return what a method's documentation says of each option."""
    from docstring_parser import parse

    documented: dict[str, str] = {}
    for config in reversed(method_configs()[name].__mro__):
        for told in parse(config.__doc__ or "").params:
            documented |= dict.fromkeys(told.arg_name.split(", "), one_line(told.description or ""))
    return documented


def summary(name: str) -> str:
    """Return what a method is, in one line: the first of its file."""
    if name in BASELINES:
        return BASELINES[name]
    if name in OTHER_NAMES:
        return OTHER_NAMES[name][1]
    from inlay.method import METHODS

    module = sys.modules[METHODS[name.upper().replace("-", "_")].__module__]
    return (module.__doc__ or "").strip().partition("\n")[0]


def chosen_method(argv: Sequence[str]) -> tuple[str, str]:
    """Return the method, and its preset, that a command line or its YAML file names; empty where neither does."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--method", "--method.name", dest="method")
    peek.add_argument("--method.preset", dest="preset")
    peek.add_argument("--config", action="append", default=[])
    try:
        seen, _ = peek.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(one_line(error)) from None
    name, preset = seen.method, seen.preset
    for path in reversed(seen.config):
        method = _read_yaml(path).get("method")
        if isinstance(method, str) and name is None:
            raise UserError(
                f"{path}: write 'method: {{name: {method}}}', because a method's options stand beside its name"
            )
        if isinstance(method, dict):
            name, preset = name or method.get("name"), preset or method.get("preset")
    return str(name or ""), str(preset or "")


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: holds no options (key: value lines)")
    return values
