"""Mistakes get one clear line, exit code 2, and nothing half-written."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Files = dict[str, Path]
Run = Callable[..., str]


@pytest.fixture
def train(models: Files, data: Files, tmp_path: Path, complaint: Run) -> Run:
    """Train with one thing wrong; no output may be left."""

    def run(*words: Any, **changes: Any) -> str:
        options = {
            "model": models["bert"], "task": "text-classification", "train_data": data["train"], "output_dir": tmp_path / "out",
        } | changes  # fmt: skip
        line = complaint(
            "train", *(w for name, value in options.items() for w in (f"--{name}", value)), *words
        )
        assert not (tmp_path / "out").exists()
        return line

    return run


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tran"], "unknown command 'tran'; did you mean 'train'?"),
        (["train", "--modle", "x"], "unknown option --modle; did you mean '--model'?"),
        (["train", "--model", "x"], "--task, --train-data, --output-dir are needed"),
        (["train", "--task", "text-clasification"], "did you mean 'text-classification'?"),
        (["train", "--epochs", "many"], "--epochs: 'many' is not a number above 0"),
        (["train", "--batch_size", "0"], "--batch-size: '0' is not a whole number above 0"),
        (["train", "--method", "loar"], "unknown method 'loar'; did you mean 'lora'?"),
        (["train", "--method", "lora", "--method.lora_alhpa", "1"], "did you mean '--method.lora-alpha'?"),
        (["train", "--method"], "expected one argument"),
        (["train", "--trainer", "x"], "--trainer: 'x' is not a mapping of names to values"),
        (["train", "--method.r", "big"], "--method.r: 'big' is not a whole number"),
        (["train", "--config", "none.yaml"], "--config none.yaml: No such file or directory"),
        (["inspect"], "PATH is needed"),
        (["methods", "dorra"], "did you mean 'dora'?"),
        (["evaluate", "--data", "x"], "which model? give --adapter FOLDER"),
    ],
)
def test_mistyped_words(words: list[str], expected: str, complaint: Run) -> None:
    assert expected in complaint(*words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle: x\n", "unknown option 'modle' in the YAML file; did you mean 'model'?"),
        ("method: lora\n", "write 'method: {name: lora}'"),
        ("a: [\n", "not valid YAML"),
        ("- a\n", "holds no options"),
    ],
)
def test_mistakes_in_yaml(tmp_path: Path, complaint: Run, text: str, expected: str) -> None:
    assert expected in complaint("train", "--config", write(tmp_path / "c.yaml", text))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.jsonl", '{"sentence": "a", "label": 1}\n', "no column 'text'; the data has 'sentence', 'label'; --columns.text NAME"),
        ("x.jsonl", '{"txt": "a", "label": 1}\n', "no column 'text'; the data has 'txt', 'label'; did you mean 'txt'?"),
        ("x.jsonl", '{"text": "a", "label": 1}\n{"text": "a"}\n', "line 2: column 'label': missing; the row has 'text'"),
        ("x.jsonl", '{"text": "a", "label": 1}\n\n{"text": "a", "lab\n', "line 3: not valid JSON"),
        ("x.jsonl", b'{"text": "a", "label": 1}\n{"text": "\xff", "label": 1}\n', "line 2: not valid JSON"),
        ("x.jsonl", '[1]\n', "line 1: a JSON object is needed on every line, not a list"),
        ("x.jsonl", '{"text": 5, "label": 1}\n', "line 1: column 'text': a text is needed, here is '5' (int)"),
        ("x.jsonl", '{"text": "a", "label": null}\n', "line 1: column 'label': a label is needed, here is nothing"),
        ("x.jsonl", '{"text": "a", "label": 1}\n', "all rows have the label '1'; two classes are needed"),
        ("x.jsonl", "", "no rows; the file is empty"),
        ("x.csv", "text,label\n", "no rows; the file is empty"),
        ("x.csv", "text,label\na,b\na,b,c\n", "line 3: 3 columns, but the header has 2"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a", "label": 1}\n' * 9, mtime=0)[:-12], "broken gzip file"),
        ("x.jsonl.gz", b"plain", "broken gzip file"),
        ("x.parquet", b"nothing", "not a readable Parquet file"),
        ("x.npz", b"nothing", "not a readable npz file"),
        ("x.xlsx", b"nothing", "unknown format '.xlsx'; known: .jsonl"),
    ],
)  # fmt: skip
def test_unusable_data(train: Run, tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    path = write(tmp_path / name, content)
    line = train(train_data=path)
    assert expected in line and str(path) in line


def test_no_such_data(train: Run, tmp_path: Path) -> None:
    assert "no such file" in train(train_data=tmp_path / "none.jsonl")
    assert "cannot load the data set" in train(train_data=tmp_path)


def test_unknown_label_in_evaluation_data(train: Run, tmp_path: Path) -> None:
    rows = write(tmp_path / "dev.jsonl", '{"text": "a", "label": "up"}\n{"text": "a", "label": "dwon"}\n')
    assert "dev.jsonl, line 2: unknown label 'dwon'; did you mean 'down'? (known: down, up)" in train(
        eval_data=rows
    )


def test_word_that_is_no_number(train: Run) -> None:
    assert "line 1: label" in train("--regression", "true")


def test_tags_and_tokens_of_different_length(train: Run, tmp_path: Path) -> None:
    rows = write(tmp_path / "x.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}\n')
    assert "line 1: 2 tokens, but 1 tags" in train(task="token-classification", train_data=rows)


def test_image_that_is_not_there(train: Run, models: Files, tmp_path: Path) -> None:
    rows = write(tmp_path / "x.csv", "image,label\nnone.png,1\n")
    assert "line 2: column 'image': no readable image at 'none.png'" in train(
        task="image-classification", model=models["vit"], train_data=rows
    )


def test_models_that_do_not_fit(train: Run, models: Files, tmp_path: Path) -> None:
    assert "is not a model folder" in train(model=tmp_path)
    assert "no such model folder" in train(model=tmp_path / "none")
    assert "q_porj" in train("--method.target-modules", '["q_porj"]')
    assert "positions" in train("--max-length", 500)
    assert "cannot load" in train(model=models["vit"])
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    write(hollow / "config.json", (models["bert"] / "config.json").read_bytes())
    assert "cannot load" in train(model=hollow)


def test_no_permission(train: Run, data: Files, tmp_path: Path) -> None:
    assert "cannot write to" in train(output_dir=data["train"] / "out")  # a folder inside a file
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "cannot write to" in train(output_dir=tmp_path / "closed" / "out")


def test_folders_that_are_no_adapters(tmp_path: Path, complaint: Run, data: Files, models: Files) -> None:
    for command in (
        ["evaluate", "--data", data["dev"]],
        ["predict", "--data", data["dev"]],
        ["merge", "--output-dir", tmp_path / "m"],
    ):
        assert "is not an adapter folder: it has no adapter_config.json" in complaint(
            *command, "--adapter", models["bert"]
        )
    assert "neither an adapter nor a model folder" in complaint("inspect", tmp_path)
    assert "what it does is unknown" in complaint(
        "evaluate", "--model", models["bert"], "--data", data["dev"]
    )
    assert not (tmp_path / "m").exists()


def test_damaged_adapters(inlay: Run, complaint: Run, tmp_path: Path, models: Files, data: Files) -> None:
    common = [
        "--model",
        models["bert"],
        "--task",
        "text-classification",
        "--train-data",
        data["train"],
        "--max-steps",
        1,
    ]
    inlay("train", *common, "--output-dir", tmp_path / "out")
    adapter = tmp_path / "out" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")})
    )
    assert "is gone" in complaint("evaluate", "--adapter", adapter, "--data", data["dev"])
    inlay("evaluate", "--adapter", adapter, "--model", models["bert"], "--data", data["dev"])
    target = tmp_path / "answers.jsonl"
    target.write_text("earlier\n")
    words = [
        "predict",
        "--adapter",
        adapter,
        "--model",
        models["bert"],
        "--data",
        data["dev"],
        "--output",
        target,
    ]
    assert "already exists; use --overwrite" in complaint(*words)
    assert f"did you mean {adapter}?" in complaint(
        "evaluate", "--adapter", adapter.parent, "--data", data["dev"]
    )
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot load the adapter" in complaint(*words, "--overwrite")
    assert target.read_text() == "earlier\n" and not list(tmp_path.glob(".*"))


def test_an_encoder_cannot_learn_to_go_on_with_a_text(data: Files, models: Files, train: Run) -> None:
    line = train(task="causal-lm", train_data=data["pairs"])
    assert "BertLMHeadModel sees the tokens that come later" in line and "is_decoder" in line
