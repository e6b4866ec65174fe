"""Rows from files, folders and the hub: every reader yields ``(number, row)``, and an unreadable row is named by its number."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .errors import UserError, one_line, told_as

Row = dict[str, Any]
Numbered = Iterator[tuple[int, Row]]


@dataclass
class Source:
    """Rows and the words to point at one of them."""

    name: str
    unit: str
    rows: Numbered
    folder: Path

    def at(self, number: int) -> str:
        """Return for example ``dev.jsonl, line 17``."""
        return f"{self.name}, {self.unit} {number}"


def open_source(spec: str, split: str) -> Source:
    """Return the rows that ``spec`` names: a file, a folder of the datasets library, a hub name, or ``-``.

    Args:
        spec: what the user gave.
        split: the split to take where a folder or a hub name has several and the user named none.

    Raises:
        UserError: nothing is there, or it is of no known format. Later, from the rows: an unreadable row.
    """
    path = Path(spec)
    if spec == "-":
        return Source("standard input", "line", _jsonl(sys.stdin.buffer, "standard input"), Path())
    if path.is_file():
        suffix = _suffix(path)
        if suffix not in READERS:
            raise UserError(
                f"{spec}: unknown format {suffix or 'without an ending'!r}; known: {', '.join(READERS)}, and .gz of these"
            )
        unit, reader = READERS[suffix]
        return Source(spec, unit, _file_rows(path, reader), path.parent)
    if (
        path.suffix
        and not Path(spec.partition(":")[0]).is_dir()
        and (_suffix(path) in READERS or path.is_absolute())
    ):
        raise UserError(f"{spec}: no such file")
    return Source(spec, "row", _dataset_rows(spec, split), Path())


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _file_rows(path: Path, reader: Callable[[IO[bytes], str], Numbered]) -> Numbered:
    name = str(path)
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield from reader(file, name)  # type: ignore[arg-type]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{name}: broken gzip file: {one_line(error)}") from None
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or one_line(error)}") from None


def _jsonl(file: IO[bytes], name: str) -> Numbered:
    for number, line in enumerate(
        file, 1
    ):  # bytes end at "\n" only; texts may hold U+2028 and other separators
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{name}, line {number}: not valid JSON: {one_line(error)}") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{name}, line {number}: a JSON object is needed on every line, not a {type(row).__name__}"
            )
        yield number, row


def _separated(delimiter: str) -> Callable[[IO[bytes], str], Numbered]:
    def read(file: IO[bytes], name: str) -> Numbered:
        csv.field_size_limit(2**31 - 1)
        texts = (line.decode("utf-8" if number else "utf-8-sig") for number, line in enumerate(file))
        rows = csv.reader(texts, delimiter=delimiter, strict=True)
        try:
            header = next(rows, None)
            for row in rows:
                if not row:
                    continue
                if header is None or len(row) != len(header):
                    raise UserError(
                        f"{name}, line {rows.line_num}: {len(row)} columns, but the header has {len(header or [])}"
                    )
                yield rows.line_num, dict(zip(header, row, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{name}, line {rows.line_num + 1}: unreadable: {one_line(error)}") from None

    return read


def _text(file: IO[bytes], name: str) -> Numbered:
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{name}, line {number}: not UTF-8: {one_line(error)}") from None
        if text.strip():
            yield number, {"text": text}


def _parquet(file: IO[bytes], name: str) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(file.read()))
        rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
        yield from enumerate(rows, 1)
    except pyarrow.ArrowException as error:
        raise UserError(f"{name}: not a readable Parquet file: {one_line(error)}") from None


def _npz(file: IO[bytes], name: str) -> Numbered:
    import numpy as np

    try:
        with np.load(io.BytesIO(file.read()), allow_pickle=False) as arrays:
            columns = {key: arrays[key] for key in arrays.files}
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{name}: not a readable npz file: {one_line(error)}") from None
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        raise UserError(f"{name}: its arrays have different lengths: {sorted(lengths)}")
    for index in range(lengths.pop() if lengths else 0):
        yield index + 1, {key: _item(column[index]) for key, column in columns.items()}


def _item(value: Any) -> Any:
    return value.item() if value.ndim == 0 else value


READERS: dict[str, tuple[str, Callable[[IO[bytes], str], Numbered]]] = {
    ".jsonl": ("line", _jsonl),
    ".json": ("line", _jsonl),
    ".csv": ("line", _separated(",")),
    ".tsv": ("line", _separated("\t")),
    ".txt": ("line", _text),
    ".parquet": ("row", _parquet),
    ".npz": ("row", _npz),
}


def _dataset_rows(spec: str, split: str) -> Numbered:
    import datasets

    name, *rest = spec.split(":")
    config, wanted = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else None)
    with told_as(f"cannot load the data set {spec!r}"):
        folder = Path(name)
        if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, config)
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[_split(spec, wanted, split, list(loaded))]
    for column, feature in loaded.features.items():
        if isinstance(feature, datasets.Image):
            loaded = loaded.cast_column(column, datasets.Image(decode=False))
    for index, row in enumerate(loaded, 1):
        yield index, {column: _named(value, loaded.features[column]) for column, value in row.items()}


def _split(spec: str, wanted: str | None, split: str, known: list[str]) -> str:
    usual = {"train": ["train"], "eval": ["validation", "dev", "valid", "test"]}[split]
    found = next((s for s in ([wanted] if wanted else usual) if s in known), None)
    if found is None and wanted is None and len(known) == 1:
        return known[0]
    if found is None:
        raise UserError(
            f"{spec}: no split {wanted or usual[0]!r}; it has {', '.join(known)}: write NAME:SPLIT"
        )
    return found


def _named(value: Any, feature: Any) -> Any:
    """Return class numbers as the names that the data set gives them."""
    if hasattr(feature, "int2str") and value is not None:
        return feature.int2str(value)
    inner: Any = getattr(feature, "feature", None)
    return inner.int2str(value) if hasattr(inner, "int2str") and value else value
