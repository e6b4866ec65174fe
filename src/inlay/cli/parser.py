"""From the option dataclasses to one parser: YAML files, typed values, help."""

from __future__ import annotations

import typing
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser, Namespace

from . import catalogue
from .errors import UserError, one_line
from .hints import explained
from .options import GROUPS, Chosen, Convert, Evaluate, Inspect, Merge, Methods, Predict, Train

COMMANDS: dict[str, type] = {
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "merge": Merge,
    "convert": Convert,
    "inspect": Inspect,
    "methods": Methods,
}
WELCOME = (
    "Inlay adapts a large pretrained model by training a small part that is set into it. Every command explains itself:"
    " 'inlay train --help'. Options may be spelled with dashes or underscores."
)


def parse(argv: Sequence[str]) -> tuple[str, Any]:
    """Return the command and its options, an instance of the command's dataclass.

    Raises:
        UserError: an unknown option or a value of the wrong type; the message hints at the nearest known word.
        SystemExit: help was asked for and has been printed.
    """
    words = list(argv) or ["--help"]
    command = next((word for word in words if not word.startswith("-")), "")
    parsers = {name: _command_parser(name, options) for name, options in COMMANDS.items()}
    method, preset = _method_of(words) if command == "train" else ("", "")
    if method:
        _add_method_options(parsers["train"], method, preset)
    top = ArgumentParser(prog="inlay", description=WELCOME, exit_on_error=False)
    commands = top.add_subcommands(required=True, dest="command")
    for name, parser in parsers.items():
        commands.add_subcommand(name, parser, help=_summary(COMMANDS[name])[0])
    chosen = parsers.get(command, top)
    try:
        values = top.parse_args(_canonical(words, chosen))
    except ArgumentError as error:
        raise UserError(explained(str(error), command, chosen, COMMANDS)) from None
    options = _filled(COMMANDS[command], values[command])
    if method:
        options.method.options = _given_for_method(method, preset, values[command]["method"])
    return command, options


def _command_parser(name: str, options: type) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"inlay {name}", description=" ".join(_summary(options)), exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="a YAML file with any of these options")
    _add_options(parser, options, "", {})
    return parser


def _summary(options: type) -> tuple[str, str]:
    summary, _, rest = (options.__doc__ or "").partition("\n")
    return summary, one_line(rest)


def _add_options(parser: ArgumentParser, options: type, prefix: str, groups: dict[str, Any]) -> None:
    hints = typing.get_type_hints(options)
    told = [f for f in fields(options) if f.metadata]
    for f in sorted(told, key=lambda f: GROUPS.index(f.metadata["group"])):
        title, hint = f.metadata["group"], hints[f.name]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title]
        if is_dataclass(hint):
            _add_options(parser, typing.cast("type", hint), f"{f.name}.", groups)
            continue
        known: dict[str, Any] = {"help": f.metadata["help"]}
        if not f.metadata["required"]:
            known["default"] = catalogue.default_of(f)
        if f.metadata["positional"]:
            group.add_argument(f.name, type=hint, nargs=None if f.metadata["required"] else "?", **known)
        elif hint is bool:
            group.add_argument(_flag(prefix + f.name), action=ActionYesNo(no_prefix="no-"), **known)
        else:
            group.add_argument(_flag(prefix + f.name), type=hint, required=f.metadata["required"], **known)


def _add_method_options(parser: ArgumentParser, name: str, preset: str) -> None:
    group = parser.add_argument_group(f"options of {name}")
    types, told = catalogue.option_types(name), catalogue.option_help(name)
    usual = catalogue.preset_options(name, preset)
    if presets := catalogue.preset_names(name):
        group.add_argument(
            "--method.preset",
            type=str | None,
            default=None,
            help=f"a known configuration, whose values the other options change: {', '.join(presets)}",
        )
    for f in catalogue.own_options(name):
        group.add_argument(
            _flag(f"method.{f.name}"),
            type=types[f.name],
            default=usual.get(f.name, catalogue.default_of(f)),
            help=told.get(f.name, ""),
        )


def _method_of(words: Sequence[str]) -> tuple[str, str]:
    """Return the method whose options are on the line, and its preset; none for general help, which then needs no torch."""
    name, preset = catalogue.chosen_method(words)
    if not name and {"-h", "--help"} & set(words):
        return "", ""
    name = name or Chosen().name
    catalogue.check_method(name)
    return ("", "") if name in catalogue.BASELINES else (name, preset)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _canonical(words: Sequence[str], parser: ArgumentParser) -> list[str]:
    """Return the words with underscores and dashes in option names as the parser spells them."""
    spellings = {o.replace("-", "_"): o for action in parser._actions for o in action.option_strings}
    return [_canonical_word(word, spellings) if word.startswith("--") else word for word in words]


def _canonical_word(word: str, spellings: dict[str, str]) -> str:
    name, equals, value = word.partition("=")
    name = "--method.name" if name == "--method" else name
    plain = name.replace("-", "_")
    whole, dot, key = plain.partition(".")
    if plain in spellings:
        name = spellings[plain]
    elif dot and whole in spellings:  # a key of a dictionary, whose keys have underscores
        name = f"{spellings[whole]}.{key}"
    return f"{name}{equals}{value}"


def _filled(options: type, values: Namespace) -> Any:
    """Return the dataclass with the parsed values."""
    hints = typing.get_type_hints(options)
    told = [f.name for f in fields(options) if f.metadata]
    return options(
        **{n: _filled(hints[n], values[n]) if is_dataclass(hints[n]) else _plain(values[n]) for n in told}
    )


def _plain(value: Any) -> Any:
    """Return numbers of the parser's restricted types as plain ones."""
    number = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
    return value if number is None else number(value)


def _given_for_method(name: str, preset: str, values: Namespace) -> dict[str, Any]:
    """Return the method's options that are not at their default, which a preset changes."""
    bare = ArgumentParser()
    _add_method_options(bare, name, preset)
    usual = vars(bare.parse_args([])["method"])
    changed = {key: value for key, value in vars(values).items() if key in usual and value != usual[key]}
    return {key: value.as_dict() if isinstance(value, Namespace) else value for key, value in changed.items()}
