"""Checks of a configuration's fields that several methods share."""

from __future__ import annotations

import warnings
from typing import Any

from ..errors import PeftWarning


def check_switches(config: Any, *names: str) -> None:
    """Raise ValueError if a field that is on or off holds anything but True or False; "no" would be on."""
    for name in names:
        if not isinstance(value := getattr(config, name), bool):
            raise ValueError(f"{name}={value!r} must be True or False")


def check_share(name: str, value: Any) -> None:
    """Raise ValueError unless a value is a number of at least 0 and below 1."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r} must be a number of at least 0 and below 1")


def check_block_numbers(name: str, value: Any) -> list[int]:
    """Return numbers of blocks as a list.

    Raises:
        ValueError: it is no collection of whole numbers of at least 0.
    """
    if isinstance(value, (list, tuple, set, frozenset, range)):
        numbers = list(value)
        if all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            return numbers
    raise ValueError(f"{name}={value!r} must be a list of numbers of blocks, counted from 0, such as [0, 1]")


def warn_of_idle(config: Any, name: str, usual: Any, needs: str) -> None:
    """Warn of a field that is set to something unusual and has no effect, because it needs another setting."""
    if (value := getattr(config, name)) != usual:
        warnings.warn(f"{name}={value!r} has no effect; it is for {needs}", PeftWarning, stacklevel=4)
