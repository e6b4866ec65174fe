"""Tiny models with random weights and tiny data, made once per session: a training run takes about a second."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = [
    *(
        "good",
        "bad",
        "fine",
        "poor",
        "film",
        "song",
        "food",
        "red",
        "green",
        "blue",
        "one",
        "two",
        "three",
        "a",
    ),
    *("the", "is", "not", "very", ".", "<pad>", "<unk>", "<s>", "</s>", "[CLS]", "[SEP]"),
]


def _tokenizer(classifier: bool) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if classifier:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
        )  # fmt: skip
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            unk_token="<unk>",
            cls_token="[CLS]",
            sep_token="[SEP]",
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    )  # no padding token, as GPT-2


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models: bert, gpt2, t5, vit, mobilenet."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    size, root = len(WORDS), tmp_path_factory.mktemp("models")
    bert = t.BertConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, pad_token_id=WORDS.index("<pad>"), initializer_range=0.2,
    )  # fmt: skip
    gpt2 = t.GPT2Config(
        vocab_size=size,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=None,
        eos_token_id=WORDS.index("</s>"),
    )
    t5 = t.T5Config(
        vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=WORDS.index("<pad>"),
        eos_token_id=WORDS.index("</s>"), decoder_start_token_id=WORDS.index("<pad>"),
    )  # fmt: skip
    vit = t.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
    )
    mobilenet = t.MobileNetV2Config(depth_multiplier=0.35, image_size=32)
    t.MobileNetV2ForImageClassification(mobilenet).save_pretrained(root / "mobilenet")
    t.BertForMaskedLM(bert).save_pretrained(root / "bert")
    t.GPT2LMHeadModel(gpt2).save_pretrained(root / "gpt2")
    t.T5ForConditionalGeneration(t5).save_pretrained(root / "t5")
    t.ViTModel(vit).save_pretrained(root / "vit")
    _tokenizer(True).save_pretrained(root / "bert")
    for name in ("gpt2", "t5"):
        _tokenizer(False).save_pretrained(root / name)
    t.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(root / "vit")
    t.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "mobilenet")
    return {path.name: path for path in root.iterdir()}


def sentiments(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose label is in one word of the text."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        mood = draw.choice(["good", "fine", "bad", "poor"])
        words = ["the", draw.choice(["film", "song", "food"]), *["very"] * draw.randrange(3), "is", mood, "."]
        rows.append({"text": " ".join(words), "label": "up" if mood in ("good", "fine") else "down"})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of small data sets by the name of what they hold."""
    import numpy as np

    root = tmp_path_factory.mktemp("data")
    pairs = [{"prompt": f"{a} {b}", "response": f"{b} {a}"} for a in WORDS[:8] for b in WORDS[:8]]
    tagged = [
        {"tokens": ["the", "red", "film", "is", "good"], "tags": ["O", "B-thing", "I-thing", "O", "O"]},
        {"tokens": ["a", "song", "."], "tags": ["O", "B-thing", "O"]},
    ] * 20
    draw = np.random.default_rng(0)
    labels = np.arange(40) % 2
    images = (draw.integers(0, 120, (40, 20, 20, 3)) + 120 * labels[:, None, None, None]).astype("uint8")
    np.savez(root / "images.npz", image=images, label=labels)
    return {
        "train": write_rows(root / "train.jsonl", sentiments(96)),
        "dev": write_rows(root / "dev.jsonl", sentiments(32, seed=1)),
        "pairs": write_rows(root / "pairs.jsonl", pairs),
        "tagged": write_rows(root / "tagged.jsonl", tagged),
        "texts": write_rows(root / "texts.jsonl", [{"text": row["text"]} for row in sentiments(64)]),
        "scores": write_rows(
            root / "scores.jsonl",
            [{"text": r["text"], "label": 1.5 * (r["label"] == "up")} for r in sentiments(64)],
        ),
        "images": root / "images.npz",
    }


@pytest.fixture
def training(tmp_path: Path) -> Callable[..., list[Any]]:
    """The words of a training run into ``tmp_path / "out"``."""

    def words(model: Path, task: str, train: Path, *more: Any, dev: Path | None = None) -> list[Any]:
        evaluation = [] if dev is None else ["--eval-data", dev]
        common = ["--model", model, "--task", task, "--train-data", train, "--output-dir", tmp_path / "out"]
        return ["train", *common, *evaluation, *more]

    return words


@pytest.fixture
def inlay(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line; returns what it prints, and fails on another exit code than 0."""
    from inlay.cli.main import main

    def run(*words: Any) -> str:
        # transformers 4 keeps the precision of one command here for the next of the same process.
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail as bad input does: exit code 2 and one line; returns the line."""
    from inlay.cli.main import main

    def run(*words: Any) -> str:
        capsys.readouterr()
        code = main([str(word) for word in words])
        error = capsys.readouterr().err
        assert code == 2, error
        lines = [line for line in error.splitlines() if line.startswith("inlay: error: ")]
        assert len(lines) == 1 and error.endswith(lines[0] + "\n"), error
        return lines[0].removeprefix("inlay: error: ")

    return run
