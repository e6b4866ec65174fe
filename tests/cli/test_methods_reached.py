"""``inlay train --method ...`` reaches every registered method, and what it leaves can be evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from inlay.cli.catalogue import method_configs
from inlay.methods.reft import orthonormal

Run = Callable[..., str]
Words = Callable[..., list[Any]]
Files = dict[str, Path]

OPTIONS: dict[str, list[Any]] = {
    "trainable-tokens": ["--method.token-indices", "[1, 2]"],
    "adalora": ["--method.init-r", 3, "--method.target-r", 2],
    "shira": ["--method.r", 1],
    "oft": ["--method.oft-block-size", 4],
    "p-tuning": ["--method.num-virtual-tokens", 3],
    "p-tuning-v2": ["--method.num-virtual-tokens", 3],
    "prefix-tuning": ["--method.num-virtual-tokens", 3, "--method.prefix-projection", "true"],
    "prompt-tuning": ["--method.num-virtual-tokens", 3, "--method.prompt-tuning-init", "SAMPLE_VOCAB"],
    "reft": ["--method.layers", "[0]", "--method.suffix-positions", 1, "--method.orthogonality", "false"],
    "bottleneck": [
        *["--method.reduction-factor", '{"0": 4, "default": 8}', "--method.scaling", "learned"],
        *["--method.original-ln-before", "true", "--method.residual-before-ln", "post_add"],
    ],
}
"""What a method needs besides its defaults on models this small."""


@pytest.mark.parametrize("method", sorted(method_configs()))
def test_a_method_is_trained_and_evaluated(
    models: Files, data: Files, tmp_path: Path, inlay: Run, training: Words, method: str
) -> None:
    model, task, rows, metric = (
        ("gpt2", "causal-lm", "pairs", "perplexity")
        if method == "trainable-tokens"  # which trains no head
        else ("bert", "text-classification", "dev", "accuracy")
    )
    words = training(models[model], task, data[rows], "--max-steps", 4, dev=data[rows])
    inlay(*words, "--method", method, *OPTIONS.get(method, []))
    folder = Path(words[words.index("--output-dir") + 1])
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["peft_type"]
    assert metric in inlay("evaluate", "--adapter", folder / "adapter", "--data", data[rows])
    if method == "adalora":
        ranks = json.loads((folder / "ranks.json").read_text())
        # Some ranks are gone; the best checkpoint may be from before the last of them went.
        assert 2 * len(ranks["ranks"]) <= ranks["total"] < 3 * len(ranks["ranks"])
        assert (folder / "ranks.png").stat().st_size > 1000


def test_a_method_that_cannot_train_the_head_says_so(
    models: Files, data: Files, training: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    from inlay.cli.main import main

    words = training(models["bert"], "text-classification", data["train"], "--max-steps", 1)
    tokens = ["--method", "trainable-tokens", "--method.token-indices", "[1]"]
    assert main([str(word) for word in [*words, *tokens]]) == 2
    assert "cannot train bert.pooler, classifier" in capsys.readouterr().err


def test_a_preset_is_reached_and_its_options_can_be_changed(
    models: Files, data: Files, inlay: Run, training: Words
) -> None:
    words = training(models["bert"], "text-classification", data["dev"], "--max-steps", 1)
    # 16 is the default of the method, but not of the preset: it is a change all the same.
    own = ["--method.preset", "par_bn", "--method.reduction-factor", 16, "--method.dropout", 0.25]
    inlay(*words, "--method", "bottleneck", *own)
    folder = Path(words[words.index("--output-dir") + 1])
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    found = [config[name] for name in ("parallel", "scaling", "reduction_factor", "dropout")]
    assert found == [True, 4.0, 16, 0.25]
    assert "preset: par_bn" in (folder / "config.yaml").read_text()


def test_an_unknown_preset_says_which_there_are(
    models: Files, data: Files, training: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    from inlay.cli.main import main

    words = training(models["bert"], "text-classification", data["train"], "--max-steps", 1)
    preset = ["--method", "reft", "--method.preset", "lorefft"]
    assert main([str(word) for word in [*words, *preset]]) == 2
    assert "unknown preset 'lorefft'; did you mean 'loreft'?" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix-tuning", "reft"])
def test_what_was_trained_goes_to_adapterhub_and_back(
    models: Files, data: Files, tmp_path: Path, inlay: Run, training: Words, method: str
) -> None:
    words = training(models["bert"], "text-classification", data["dev"], "--max-steps", 1)
    options = {
        "prefix-tuning": ["--method.num-virtual-tokens", 3, "--method.shift-positions", "false"],
    }
    inlay(*words, "--method", method, *options.get(method, []))
    trained = Path(words[words.index("--output-dir") + 1]) / "adapter"
    there, back = tmp_path / "there", tmp_path / "back"
    inlay("convert", trained, "--output-dir", there)
    assert json.loads((there / "adapter_config.json").read_text())["version"].startswith("adapters.")
    inlay("convert", there, "--output-dir", back)
    first, again = (load_file(folder / "adapter_model.safetensors") for folder in (trained, back))
    assert again and again.keys() <= first.keys()  # heads stay behind
    for key, tensor in again.items():
        wanted = orthonormal(first[key]) if "projection" in key else first[key]
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-6 if "projection" in key else 0, msg=key)
