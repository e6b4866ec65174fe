"""The command line as the README shows it, run word for word."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from inlay.cli.main import main


def commands_of(readme: Path) -> list[list[str]]:
    """Return the README's `inlay` commands, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [
        shlex.split(line)[1:] for block in blocks for line in block.splitlines() if line.startswith("inlay ")
    ]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def test_the_command_line_of_the_readme(
    repository: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models["bert"], "path/to/model")
    rows = [
        {"text": f"{word} film {n}", "label": word}
        for n in ("one", "two", "three")
        for word in ("good", "bad")
        for _ in range(4)
    ]
    for name in ("train.jsonl.gz", "dev.jsonl.gz", "test.jsonl.gz"):
        write_rows(Path(name), rows)
    write_rows(Path("new.jsonl"), [{"text": row["text"]} for row in rows[:3]])

    shown = commands_of(repository / "README.md")
    assert [command[0] for command in shown] == [
        "train",
        "evaluate",
        "predict",
        "merge",
        "inspect",
        "methods",
    ]
    for command in shown:
        assert main(command) == 0, command

    assert len(Path("predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert Path("merged/config.json").is_file()
    assert Path("out/adapter/adapter_model.safetensors").is_file()
