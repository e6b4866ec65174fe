"""The same rows out of every format."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from inlay.cli.data import Layout, read_table
from inlay.cli.errors import UserError
from inlay.cli.options import Columns

ROWS = [
    {"text": 'it\u2028is "good", or\x85not', "label": "1"},
    {"text": "NA", "label": "0"},
    {"text": "2020-01-01", "label": "1"},
]
LAYOUT = [Layout(("text",), ("label",), optional=("text2",))]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def separated(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    import csv

    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["text", "label"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str, packed: bool) -> None:
    content = {
        ".jsonl": lines(ROWS),
        ".csv": separated(ROWS, ","),
        ".tsv": separated(ROWS, "\t"),
        ".parquet": parquet(ROWS),
    }[ending]
    path = tmp_path / f"rows{ending}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    table = read_table(str(path), LAYOUT, Columns())
    assert table["text"] == [row["text"] for row in ROWS]
    assert table["label"] == [row["label"] for row in ROWS]


def test_dataset_folders_and_their_splits(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    part = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    DatasetDict({"train": part, "validation": part.select([1])}).save_to_disk(tmp_path / "set")
    assert read_table(str(tmp_path / "set"), LAYOUT, Columns(), split="train")["label"] == ["yes", "no"]
    assert read_table(str(tmp_path / "set"), LAYOUT, Columns())["label"] == ["no"]
    assert len(read_table(f"{tmp_path / 'set'}:train", LAYOUT, Columns())) == 2
    with pytest.raises(UserError, match="no split 'tset'; it has train, validation"):
        read_table(f"{tmp_path / 'set'}:tset", LAYOUT, Columns())
    part.save_to_disk(tmp_path / "one")
    assert len(read_table(str(tmp_path / "one"), LAYOUT, Columns(), split="train")) == 2


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class Input:
        buffer = io.BytesIO(lines(ROWS))

    monkeypatch.setattr("sys.stdin", Input)
    assert len(read_table("-", LAYOUT, Columns(), targets=False)) == 3


def test_a_named_optional_column_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(ROWS))
    with pytest.raises(UserError, match="column 'other': missing"):
        read_table(str(path), LAYOUT, Columns(text2="other"))


def test_lists_of_words_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('tokens,tags\nthe red film,O B-x I-x\n"[""a b"", ""c""]","[""O"", ""O""]"\n')
    table = read_table(str(path), [Layout(("tokens",), ("tags",))], Columns())
    assert table["tokens"] == [["the", "red", "film"], ["a b", "c"]]
