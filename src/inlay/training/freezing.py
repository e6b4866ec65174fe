"""Freezing by name: which parameters of a model are trained, chosen by patterns or by method.

    in include only -> frozen        in exclude only -> trained        in both or in neither -> as it was

Patterns are those of ``fnmatch`` and must match a parameter's whole name. The functions, their modes and this rule are those of
the MindPet toolkit; where Inlay differs on purpose is told in ``docs/freezing.md``. Everything is decided before anything is
changed, so an error leaves the model as it was.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..errors import PeftError
from ..injection.walk import adapted_layers
from ..method import METHODS, load_built_in
from .parameter_names import NamedParameter, matching, named_parameters

MINDPET_MODES = ("lora", "prefixtuning", "adapter", "low_rank_adapter", "bitfit", "ptuning2")
MINDPET_PREFIXES = ("prefixtuning", "ptuning2")
BIAS_MODES = ("bitfit", "bitfit_all")


class ReadYamlFileError(PeftError, OSError):
    """A freezing configuration cannot be read, or is not YAML."""


class ModelConfigFreezeInfoError(PeftError, ValueError):
    """A freezing configuration does not have the form ``freeze: {include: [...], exclude: [...]}``."""


@dataclass(frozen=True)
class FreezeReport:
    """What a model trains after it was frozen.

    Attributes:
        trainable: how many numbers each trained parameter holds, by name; a tied one counts once, under its first name.
        total: how many numbers all parameters of the model hold.
    """

    trainable: Mapping[str, int]
    total: int

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(self.trainable.values())

    @property
    def percent(self) -> float:
        """Share of the model's numbers that are trained, in percent."""
        return 100 * self.count / self.total if self.total else 0.0

    def __str__(self) -> str:
        groups: dict[str, list[int]] = {}
        for name, size in self.trainable.items():
            groups.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), []).append(size)
        lines = [f"trains {self.count:,} of {self.total:,} parameters ({self.percent:.4f} %)"]
        return "\n".join([*lines, *(f"  {len(s):>4} x {name}: {sum(s):,}" for name, s in groups.items())])


def freeze_modules(
    model: nn.Module, include: list[str] | None = None, exclude: list[str] | None = None
) -> FreezeReport:
    """Freeze the parameters that ``include`` names and train those that ``exclude`` names.

    Args:
        model: any model.
        include: patterns of parameters to freeze.
        exclude: patterns of parameters to train; one in both lists stays as it was.

    Returns:
        What is trained now.

    Raises:
        TypeError: ``model`` is no module, or a list is no list of strings or is empty.
        ValueError: no list is given, a pattern matches nothing, or only integers are to be trained. Nothing is changed then.
    """
    _check_model(model)
    if include is None and exclude is None:
        raise ValueError("give include (what to freeze), exclude (what to train), or both; both are None")
    _check_patterns(include, "include")
    _check_patterns(exclude, "exclude")
    parameters = named_parameters(model)
    _choose(parameters, include, exclude)
    return _apply(parameters)


def freeze_delta(
    model: nn.Module, mode: str, include: list[str] | None = None, exclude: list[str] | None = None
) -> FreezeReport:
    """Train the parameters of one method and freeze all others; then do as ``freeze_modules`` with the two lists.

    Args:
        model: a model adapted by Inlay, or one whose parameters are named ``mindpet_delta_<mode>...``; any model for BitFit.
        mode: in any case, a method of Inlay ("lora" includes DoRA), or one of MindPet's: lora, prefixtuning, adapter,
            low_rank_adapter, bitfit, ptuning2. "bitfit" trains every bias but those of normalisation layers, as MindPet
            counts; "bitfit_all" trains these, too. In a model that carries a BitFit adapter, "bitfit" is that adapter.
        include: patterns of further parameters to freeze.
        exclude: patterns of further parameters to train, such as ``["classifier*"]``. An empty list is as good as None.

    Returns:
        What is trained now.

    Raises:
        TypeError: ``model`` is no module, or a list is no list of strings.
        ValueError: the mode is unknown, or it or a pattern matches nothing. Nothing is changed then.
    """
    _check_model(model)
    mode = _check_mode(mode)
    include, exclude = include if include != [] else None, exclude if exclude != [] else None
    _check_patterns(include, "include")
    _check_patterns(exclude, "exclude")
    parameters = named_parameters(model)
    chosen = _of_mode(model, parameters, mode)
    for named in parameters:
        named.trained = id(named.parameter) in chosen
    _choose(parameters, include, exclude)
    return _apply(parameters)


def freeze_from_config(model: nn.Module, path: str | os.PathLike[str]) -> FreezeReport:
    """Do as ``freeze_modules`` with the lists in a YAML file, ``freeze: {include: [...], exclude: [...]}``.

    Either list may be absent; keys beside ``freeze`` are left to others.

    Returns:
        What is trained now.

    Raises:
        TypeError: ``path`` is no path, or as for ``freeze_modules``.
        ReadYamlFileError: the file is missing, unreadable or not YAML.
        ModelConfigFreezeInfoError: the file does not have this form.
        ValueError: ``path`` is empty, or as for ``freeze_modules``.
    """
    _check_model(model)
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a string or a path, not {type(path).__name__}")
    if not os.fspath(path):
        raise ValueError("path is empty: give the path of a YAML file")
    values = _read_yaml(Path(path))
    info = values.get("freeze") if isinstance(values, dict) else None
    if not isinstance(info, dict):
        raise ModelConfigFreezeInfoError(
            f"{path} needs the key 'freeze' with a mapping: freeze: {{include: [...], exclude: [...]}}"
        )
    if unknown := sorted(map(str, info.keys() - {"include", "exclude"})):
        raise ModelConfigFreezeInfoError(
            f"{path}: keys {unknown} under 'freeze' are unknown; known are include and exclude"
        )
    return freeze_modules(model, info.get("include"), info.get("exclude"))


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ReadYamlFileError(f"{path} cannot be read as YAML: {error}") from error


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")


def _check_patterns(patterns: Any, argument: str) -> None:
    if patterns is None:
        return
    if not isinstance(patterns, list) or not patterns:
        raise TypeError(f"{argument} must be a list with at least one pattern, or None, not {patterns!r}")
    if wrong := [item for item in patterns if not isinstance(item, str)]:
        raise TypeError(f"{argument} must hold strings; {wrong[0]!r} is {type(wrong[0]).__name__}")


def _check_mode(mode: Any) -> str:
    load_built_in()
    known = sorted({*MINDPET_MODES, *BIAS_MODES, *(name.lower() for name in METHODS)})
    if isinstance(mode, str) and mode.lower() in known:
        return mode.lower()
    near = difflib.get_close_matches(str(mode).lower(), known, n=1)
    raise ValueError(
        f"unknown mode {mode!r}{f'; did you mean {near[0]!r}?' if near else ''} (known: {', '.join(known)})"
    )


def _of_mode(model: nn.Module, parameters: Sequence[NamedParameter], mode: str) -> set[int]:
    """Return the ids of the parameters that a mode trains.

    Raises:
        ValueError: there are none.
    """
    present: set[str] = set()
    found = {id(n.parameter) for n in parameters if any(f"mindpet_delta_{mode}" in name for name in n.names)}
    for _, layer in adapted_layers(model):
        for slot in layer.slots.values():
            peft_type = slot.config.peft_type
            names = {slot.config.method_name().lower(), str(getattr(peft_type, "value", peft_type)).lower()}
            if "bottleneck" in names:  # MindPet has two names for it
                names.add("adapter" if getattr(slot.config, "low_rank", None) is None else "low_rank_adapter")
            present |= names
            if mode in names:
                found |= {id(p) for p in slot.parameters().values()}
    for name, encoder in getattr(model, "prompt_encoder", {}).items():
        method = cast("Any", model).peft_config[name].method_name().lower()
        names = {method, *(MINDPET_PREFIXES if method == "prefix_tuning" else ())}
        present |= {method}
        if mode in names:
            found |= {id(p) for p in encoder.parameters()}
    if mode in BIAS_MODES and not found:
        everywhere = mode == "bitfit_all"
        found = {id(n.parameter) for n in parameters if n.is_bias() and (everywhere or not n.norm)}
    found &= {id(n.parameter) for n in parameters if n.can_learn}
    if not found:
        carries = f"it carries {', '.join(sorted(present))}" if present else "it carries no adapter"
        raise ValueError(f"the model has no parameters of mode {mode!r} to train: {carries}")
    return found


def _choose(
    parameters: Sequence[NamedParameter], include: list[str] | None, exclude: list[str] | None
) -> None:
    frozen = matching(parameters, include, "include")
    freed = matching(parameters, exclude, "exclude")
    for named in parameters:
        key = id(named.parameter)
        if (key in frozen) != (key in freed):
            named.trained = key in freed and named.can_learn


def _apply(parameters: Iterable[NamedParameter]) -> FreezeReport:
    trainable, total = {}, 0
    for named in parameters:
        named.parameter.requires_grad_(named.trained)
        total += named.size
        if named.trained:
            trainable[named.names[0]] = named.size
    return FreezeReport(trainable, total)
