"""What the parser means by its error, said in one line with the nearest known word."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable
from typing import Any

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from .errors import did_you_mean, one_line

UNKNOWN_WORDS = re.compile(r"unrecognized arguments: (?P<words>.*)")
UNKNOWN_KEY = re.compile(r"(?:does not accept option|Option) '(?P<key>[^']+)'")
WRONG_VALUE = re.compile(r'Parser key "(?P<key>[^"]+)":')
VALUES = tuple(
    re.compile(p, re.DOTALL)
    for p in (
        r"Given value: (.*)$",
        r"Got value: (.*)$",
        r"Not of type \w+: (.*?) does not conform",
        r"could not convert string to \w+: '(.*?)'",
    )
)
MISSING = re.compile(r"the following arguments are required: (?P<keys>.*)")
COMMAND = re.compile(r"invalid choice: '(?P<word>[^']*)'")


def explained(message: str, command: str, parser: Any, commands: Iterable[str]) -> str:
    """Return a parser's message in the user's words.

    Args:
        message: what jsonargparse says.
        command: the command on the line, empty where there is none.
        parser: the command's parser.
        commands: the known commands.
    """
    options = [o for action in parser._actions for o in action.option_strings if o.startswith("--")]
    help_hint = f"; see 'inlay {command} --help'"
    if command not in commands and (found := COMMAND.search(message)):
        known = list(commands)
        return f"unknown command {found['word']!r}{did_you_mean(found['word'], known)} (commands: {', '.join(known)})"
    if found := UNKNOWN_WORDS.search(message):
        words = found["words"].split()
        word = next((w for w in words if w.startswith("--")), None)
        if word is None:
            return f"unexpected word {words[0]!r}; values that contain blanks or several words need quotes{help_hint}"
        name = word.partition("=")[0]
        return f"unknown option {name}{did_you_mean(name, [*options, '--method'])}{help_hint}"
    if found := UNKNOWN_KEY.search(message):
        known = [o.removeprefix("--").replace("-", "_") for o in options]
        return (
            f"unknown option {found['key']!r} in the YAML file{did_you_mean(found['key'], known)}{help_hint}"
        )
    value = next((found[1] for pattern in VALUES if (found := pattern.search(message))), None)
    if value is not None and (found := WRONG_VALUE.search(message)):
        return _wrong_value(found["key"].removeprefix(f"{command}."), value.strip(), parser)
    if found := MISSING.search(message):
        keys = [_shown(key.strip().removeprefix(f"{command}."), options) for key in found["keys"].split(",")]
        return f"{', '.join(keys)} {'is' if len(keys) == 1 else 'are'} needed{help_hint}"
    return one_line(message)


def _shown(key: str, options: list[str]) -> str:
    name = f"--{key.replace('_', '-')}"
    return name if name in options else key.upper()


def _wrong_value(key: str, value: str, parser: Any) -> str:
    action = next((a for a in parser._actions if a.dest == key), None)
    hint = getattr(action, "_typehint", None)
    choices = _choices(hint)
    name = f"--{'method' if key == 'method.name' else key.replace('_', '-')}"
    if choices:
        return f"{name}: {value!r} is none of {', '.join(choices)}{did_you_mean(value, choices)}"
    return f"{name}: {value!r} is not {_in_words(hint)}"


def _choices(hint: Any) -> list[str]:
    if typing.get_origin(hint) is typing.Literal:
        return [str(choice) for choice in typing.get_args(hint)]
    return []


def _in_words(hint: Any) -> str:
    names = {
        int: "a whole number", float: "a number", bool: "true or false", str: "a text",
        PositiveInt: "a whole number above 0", NonNegativeInt: "a whole number of at least 0",
        PositiveFloat: "a number above 0", NonNegativeFloat: "a number of at least 0", ClosedUnitInterval: "a number from 0 to 1",
    }  # fmt: skip
    if typing.get_origin(hint) is dict:
        return "a mapping of names to values"
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts = [arg for arg in typing.get_args(hint) if arg is not type(None)] if union else [hint]
    return " or ".join(names.get(part, str(part).removeprefix("typing.")) for part in parts)
