"""Every task end to end on a tiny model: train, evaluate, predict, merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., str]
Words = Callable[..., list[Any]]
Files = dict[str, Path]
THOROUGHLY = ["--learning-rate", 0.01, "--method.target_modules", "all-linear"]


def report(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return values


def rows(path: Path) -> list[dict[str, Any]]:
    return answers(path.read_text(encoding="utf-8"))


def answers(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n")[:-1]]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_text_classification_learns_and_survives_the_round_trip(
    models: Files, data: Files, tmp_path: Path, inlay: Run, training: Words, method: str
) -> None:
    out = tmp_path / "out"
    words = training(models["bert"], "text-classification", data["train"], *THOROUGHLY, dev=data["dev"])
    inlay(*words, "--method", method, "--epochs", 25)
    metrics = report(out)
    assert metrics["eval"]["accuracy"] == 1.0
    names = {path.name for path in out.iterdir()}
    assert names == {"adapter", "checkpoints", "config.yaml", "curves.png", "metrics.json"}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert metrics["parameters"]["trainable"] < metrics["parameters"]["total"]

    adapted = json.loads(inlay("evaluate", "--adapter", out / "adapter", "--data", data["dev"]))
    assert adapted["accuracy"] == 1.0
    assert adapted["loss"] == pytest.approx(metrics["eval"]["loss"], rel=1e-5)
    inlay("merge", "--adapter", out / "adapter", "--output-dir", tmp_path / "merged")
    merged = json.loads(inlay("evaluate", "--model", tmp_path / "merged", "--data", data["dev"]))
    assert merged["loss"] == pytest.approx(adapted["loss"], rel=1e-4)

    written = tmp_path / "answers.jsonl"
    inlay("predict", "--adapter", out / "adapter", "--data", data["dev"], "--output", written)
    predicted = rows(written)
    assert [answer["label"] for answer in predicted] == [row["label"] for row in rows(data["dev"])]
    assert sum(predicted[0]["scores"].values()) == pytest.approx(1, abs=1e-4)


def test_merged_folder_loads_without_inlay(
    models: Files, data: Files, tmp_path: Path, inlay: Run, training: Words
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    inlay(*training(models["bert"], "text-classification", data["train"], "--max-steps", 2))
    inlay("merge", "--adapter", tmp_path / "out" / "adapter", "--output-dir", tmp_path / "merged")
    load = AutoModelForSequenceClassification.from_pretrained
    model, info = load(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.id2label == {0: "down", 1: "up"}
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")("the film")["input_ids"]) == 4


def test_two_sentences_and_renamed_columns(
    models: Files, tmp_path: Path, inlay: Run, complaint: Run, training: Words, data: Files
) -> None:
    pairs, adapter = tmp_path / "pairs.csv", tmp_path / "out" / "adapter"
    pairs.write_text("s1,s2,same\n" + "the film,the film,1\nthe film,a song,0\n" * 8)
    names = ["--columns.text", "s1", "--columns.text2", "s2", "--columns.label", "same"]
    inlay(*training(models["bert"], "text-classification", pairs, "--max-steps", 3, *names, dev=pairs))
    settings = json.loads((adapter / "inlay_task.json").read_text())
    assert settings["inputs"] == ["text", "text2"] and settings["labels"] == ["0", "1"]
    assert answers(inlay("predict", "--adapter", adapter, "--data", pairs))[0]["label"] in ("0", "1")
    assert "no column 's1'" in complaint("predict", "--adapter", adapter, "--data", data["dev"])


def test_a_second_sentence_is_not_read_by_a_model_of_one(
    models: Files, data: Files, tmp_path: Path, inlay: Run, training: Words
) -> None:
    inlay(*training(models["bert"], "text-classification", data["train"], "--max-steps", 1))
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text('{"text": "the film"}\n')
    two.write_text('{"text": "the film", "text2": "a song"}\n')
    predict = ["predict", "--adapter", tmp_path / "out" / "adapter", "--data"]
    assert inlay(*predict, one) == inlay(*predict, two)


def test_regression_is_recognised(
    models: Files, data: Files, tmp_path: Path, inlay: Run, training: Words
) -> None:
    scores = data["scores"]
    inlay(*training(models["bert"], "text-classification", scores, *THOROUGHLY, dev=scores), "--epochs", 20)
    assert report(tmp_path / "out")["eval"]["r2"] > 0.5
    predicted = answers(inlay("predict", "--adapter", tmp_path / "out" / "adapter", "--data", scores))
    assert isinstance(predicted[0]["label"], float)


@pytest.mark.parametrize("method", ["full", "head"])
def test_baselines(
    models: Files, data: Files, tmp_path: Path, inlay: Run, training: Words, method: str
) -> None:
    words = training(models["bert"], "text-classification", data["train"], dev=data["dev"])
    inlay(*words, "--method", method, "--max-steps", 4)
    metrics = report(tmp_path / "out")
    share = metrics["parameters"]["percent"]
    assert share == 100 if method == "full" else share < 10
    again = json.loads(inlay("evaluate", "--model", tmp_path / "out" / "model", "--data", data["dev"]))
    assert again["loss"] == pytest.approx(metrics["eval"]["loss"], rel=1e-5)


def test_token_classification(
    models: Files, data: Files, tmp_path: Path, inlay: Run, training: Words
) -> None:
    tagged = data["tagged"]
    inlay(*training(models["bert"], "token-classification", tagged, *THOROUGHLY, dev=tagged), "--epochs", 12)
    assert report(tmp_path / "out")["eval"]["f1"] == 1.0
    predicted = answers(inlay("predict", "--adapter", tmp_path / "out" / "adapter", "--data", tagged))
    assert predicted[0]["tags"] == rows(tagged)[0]["tags"]


def test_words_beyond_the_limit_get_a_tag_too(
    models: Files, data: Files, tmp_path: Path, inlay: Run, training: Words
) -> None:
    inlay(*training(models["bert"], "token-classification", data["tagged"], "--max-steps", 1))
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"tokens": ["film"] * 50}) + "\n")
    predicted = answers(inlay("predict", "--adapter", tmp_path / "out" / "adapter", "--data", long))
    assert len(predicted[0]["tags"]) == 50 and predicted[0]["tags"][-1] == "O"


def test_causal_lm_answers_prompts(
    models: Files, data: Files, tmp_path: Path, inlay: Run, training: Words
) -> None:
    pairs, more = data["pairs"], ["--epochs", 2, "--separator", " <s> ", *THOROUGHLY]
    inlay(*training(models["gpt2"], "causal-lm", pairs, *more, dev=pairs))
    evaluate = ["evaluate", "--adapter", tmp_path / "out" / "adapter", "--data", pairs]
    result = json.loads(inlay(*evaluate, "--generate", "--max-new-tokens", 4))
    trained = report(tmp_path / "out")["eval"]
    assert result["perplexity"] == pytest.approx(trained["perplexity"], rel=1e-4)
    assert 0 <= result["exact_match"] <= 1
    rough = json.loads(inlay(*evaluate, "--generate", "--max-new-tokens", 2, "--precision", "bf16"))
    assert rough["loss"] == pytest.approx(result["loss"], rel=0.02)
    one = json.loads(inlay(*evaluate, "--batch-size", 3))
    assert one["loss"] == pytest.approx(result["loss"], rel=1e-5), "the loss is per token, whatever the batch"


@pytest.mark.parametrize("pack", ["--pack", "--no-pack"])
def test_causal_lm_on_plain_text(
    models: Files, data: Files, tmp_path: Path, inlay: Run, training: Words, pack: str
) -> None:
    texts = data["texts"]
    more = ["--max-steps", 3, "--max-length", 16, pack]
    inlay(*training(models["gpt2"], "causal-lm", texts, *more, dev=texts))
    assert report(tmp_path / "out")["eval"]["perplexity"] > 1
    adapter = tmp_path / "out" / "adapter"
    assert "generated" in inlay("predict", "--adapter", adapter, "--data", texts, "--max-new-tokens", 2)


def test_only_the_response_has_a_loss(models: Files, data: Files) -> None:
    from inlay.cli.data import read_table
    from inlay.cli.options import Columns
    from inlay.cli.tasks import task_class
    from inlay.cli.tasks.base import Settings

    kind = task_class("causal-lm")
    tokenizer = kind.load_processor(str(models["gpt2"]))
    table = read_table(str(data["pairs"]), kind.layouts, Columns())  # "good good" -> "good good", ...
    end = tokenizer.eos_token_id
    whole = kind(Settings("causal-lm", separator=" <s> ", max_length=16), tokenizer).encode(table)[1]
    tokens = tokenizer("good bad <s> bad good")["input_ids"] + [end]
    assert whole["input_ids"] == tokens
    assert whole["labels"] == [-100, -100, -100, *tokens[3:]]
    cut = kind(Settings("causal-lm", separator=" <s> ", max_length=5), tokenizer).encode(table)[1]
    assert cut["input_ids"] == tokens[1:], "of a long pair, the prompt loses its beginning"


def test_seq2seq(models: Files, data: Files, tmp_path: Path, inlay: Run, training: Words) -> None:
    pairs = data["pairs"]
    inlay(*training(models["t5"], "seq2seq", pairs, "--max-steps", 4, dev=pairs))
    evaluate = ["evaluate", "--adapter", tmp_path / "out" / "adapter", "--data", pairs]
    result = json.loads(inlay(*evaluate, "--generate", "--max-new-tokens", 3))
    assert result["loss"] == pytest.approx(report(tmp_path / "out")["eval"]["loss"], rel=1e-4)


def test_image_classification(
    models: Files, data: Files, tmp_path: Path, inlay: Run, training: Words
) -> None:
    images = data["images"]
    more = ["--epochs", 8, "--learning-rate", 0.01]
    inlay(*training(models["vit"], "image-classification", images, *more, dev=images))
    assert report(tmp_path / "out")["eval"]["accuracy"] == 1.0
    predicted = answers(inlay("predict", "--adapter", tmp_path / "out" / "adapter", "--data", images))
    assert [answer["label"] for answer in predicted[:4]] == [0, 1, 0, 1]


def test_convolutions_are_adapted_where_there_are_no_linear_layers(
    models: Files, data: Files, tmp_path: Path, inlay: Run, training: Words
) -> None:
    inlay(*training(models["mobilenet"], "image-classification", data["images"], "--max-steps", 2))
    shown = json.loads(inlay("inspect", tmp_path / "out" / "adapter", "--json"))
    adapted = [part for part in shown["parts"] if "lora_A" in part["what"]]
    assert adapted and all(part["where"].endswith("convolution") for part in adapted)
    assert any(part["where"] == "classifier" for part in shown["parts"]), "the new head, trained whole"
    inlay("merge", "--adapter", tmp_path / "out" / "adapter", "--output-dir", tmp_path / "merged")


def test_images_by_path(models: Files, tmp_path: Path, inlay: Run, training: Words) -> None:
    from PIL import Image

    lines = []
    for number in range(8):
        Image.new("L", (10, 12), color=number * 30).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{'dark' if number < 4 else 'light'}\n")
    (tmp_path / "images.csv").write_text("image,label\n" + "".join(lines))
    inlay(*training(models["vit"], "image-classification", tmp_path / "images.csv", "--max-steps", 2))


def test_adapter_of_a_script_is_understood(
    models: Files, data: Files, tmp_path: Path, inlay: Run, training: Words
) -> None:
    adapter = tmp_path / "out" / "adapter"
    inlay(*training(models["bert"], "text-classification", data["train"], "--max-steps", 2))
    (adapter / "inlay_task.json").unlink()  # as PEFT would leave it
    predicted = answers(inlay("predict", "--adapter", adapter, "--data", data["dev"]))
    assert predicted[0]["label"] in (0, 1)
    inlay("merge", "--adapter", adapter, "--output-dir", tmp_path / "merged")
