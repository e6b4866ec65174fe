"""Rows become columns that a task can use: the right ones, of the right type, with the row's place for every complaint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError, did_you_mean
from .options import Columns
from .readers import Source, open_source


@dataclass(frozen=True)
class Layout:
    """The columns that one form of a task's data has, by role."""

    inputs: tuple[str, ...]
    targets: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


@dataclass
class Table:
    """Columns by role, all of the same length, and where each row came from."""

    source: Source
    layout: Layout
    columns: dict[str, list[Any]]
    numbers: list[int] = field(default_factory=list)

    @property
    def inputs(self) -> list[str]:
        """The roles that are not targets."""
        return [role for role in self.columns if role not in self.layout.targets]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, role: str) -> list[Any]:
        return self.columns[role]

    def __contains__(self, role: str) -> bool:
        return role in self.columns

    def at(self, index: int) -> str:
        """Return where a row came from, for example ``dev.jsonl, line 17``."""
        return self.source.at(self.numbers[index])


def read_table(
    spec: str, layouts: Iterable[Layout], columns: Columns, *, split: str = "eval", targets: bool = True
) -> Table:
    """Read all rows that ``spec`` names.

    Args:
        spec: a file, a folder, a hub name or ``-``.
        layouts: the forms of data that the task takes; the first whose columns are there is used.
        columns: the data's names of the columns.
        split: ``train`` or ``eval``: what to take of a data set with several splits.
        targets: whether the rows must be labelled.

    Raises:
        UserError: no rows, a missing column, or a value of the wrong type, with the row's place.
    """
    source = open_source(spec, split)
    table: Table | None = None
    wanted: dict[str, str] = {}
    for number, row in source.rows:
        if table is None:
            layout = _layout_of(row, source, list(layouts), columns, targets)
            roles = layout.inputs + (layout.targets if targets else ()) + _optional(layout, row, columns)
            wanted = {role: getattr(columns, role) for role in roles}
            table = Table(source, layout, {role: [] for role in roles})
        table.numbers.append(number)
        for role, name in wanted.items():
            try:
                table.columns[role].append(CHECKS[role](row[name], source))
            except (KeyError, ValueError) as error:
                problem = error if isinstance(error, ValueError) else f"missing; the row has {_listed(row)}"
                raise UserError(f"{source.at(number)}: column {name!r}: {problem}") from None
    if table is None:
        raise UserError(f"{spec}: no rows; the {'file' if Path(spec).is_file() else 'data'} is empty")
    return table


def _layout_of(
    row: dict[str, Any], source: Source, layouts: list[Layout], columns: Columns, targets: bool
) -> Layout:
    def missing(layout: Layout) -> list[str]:
        return [
            r for r in layout.inputs + (layout.targets if targets else ()) if getattr(columns, r) not in row
        ]

    best = min(layouts, key=lambda layout: len(missing(layout)))
    if absent := missing(best):
        role, name = absent[0], getattr(columns, absent[0])
        hint = did_you_mean(name, row) or f"; --columns.{role} NAME tells which one it is"
        raise UserError(f"{source.name}: no column {name!r}; the data has {_listed(row)}{hint}")
    return best


def _optional(layout: Layout, row: dict[str, Any], columns: Columns) -> tuple[str, ...]:
    """Return the optional roles that are in the data, or that the user named and so expects there."""
    return tuple(
        role for role in layout.optional if getattr(columns, role) in row or getattr(columns, role) != role
    )


def _listed(row: dict[str, Any]) -> str:
    return ", ".join(repr(key) for key in row) or "none"


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{str(value)[:40]!r} ({type(value).__name__})"


def _text(value: Any, source: Source) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a text is needed, here is {_shown(value)}")
    return value


def _label(value: Any, source: Source) -> str | int | float:
    usable = (
        math.isfinite(value) if isinstance(value, float) else isinstance(value, (str, int)) and value != ""
    )
    if not usable:
        raise ValueError(f"a label is needed, here is {_shown(value)}")
    return int(value) if isinstance(value, bool) else value


def _words(value: Any, source: Source) -> list[str]:
    if isinstance(value, str):  # CSV cannot hold lists
        value = json.loads(value) if value.startswith("[") else value.split()
    if not isinstance(value, list) or not value or not all(isinstance(word, str) for word in value):
        raise ValueError(f"a list of words is needed, here is {_shown(value)}")
    return value


def _image(value: Any, source: Source) -> Any:
    import PIL.Image

    if isinstance(value, str):
        path = Path(value) if Path(value).is_absolute() else source.folder / value
        try:
            PIL.Image.open(path).close()
        except OSError as error:
            raise ValueError(f"no readable image at {value!r}: {error}") from None
        return str(path)
    if hasattr(value, "dtype"):
        if value.ndim not in (2, 3) or value.dtype != "uint8":
            raise ValueError(
                f"an image is uint8 [height, width] or [height, width, 3], here is {value.dtype} {value.shape}"
            )
        return value
    if isinstance(value, dict) and (value.get("bytes") or value.get("path")):
        return value
    raise ValueError(f"an image is needed (a path or an array), here is {_shown(value)}")


CHECKS: dict[str, Callable[[Any, Source], Any]] = {
    "text": _text, "text2": _text, "prompt": _text, "response": _text,
    "label": _label, "tokens": _words, "tags": _words, "image": _image,
}  # fmt: skip
