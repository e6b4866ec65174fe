"""Prompt methods against PEFT: parameter names, logits, gradients, generated ids, and files in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import inlay
from prompt_models import (
    CAUSAL,
    METHODS,
    PREFIXES,
    TASKS,
    TOKENS,
    adapted,
    build,
    configuration,
    inputs,
    output,
)

MODELS = [*CAUSAL, *TASKS]
CUT_OFF = {(method, "mistral") for method in PREFIXES}
"""PEFT's prefix stands in the cache, where a sliding window that is shorter than the text loses it. Ours stays in sight."""
NO_HEAD_THERE = {(method, "roberta_classifier") for method in PREFIXES}
"""With transformers 4 PEFT hands the cache to this model's head in place of the features."""
PAIRS = [
    (method, model)
    for method in METHODS
    for model in MODELS
    if (method, model) not in CUT_OFF
    and (method in ("prompt-tuning", "prefix") or model in ("gpt2", "llama", "bert_classifier", "t5"))
]
pytestmark = pytest.mark.filterwarnings(
    "ignore:Position ids are not supported for parameter efficient tuning"
)


def adapted_there(method: str, model: str) -> Any:
    """Return PEFT's model, or skip the test where it fails by itself."""
    theirs = adapted(peft, method, model)
    if (method, model) in NO_HEAD_THERE:
        try:
            theirs(**inputs(model))
        except TypeError as error:
            pytest.skip(f"PEFT's {method} fails on {model} with transformers {tf.__version__}: {error}")
    return theirs


@pytest.mark.parametrize("padding", ["", "right", "left"])
@pytest.mark.parametrize(("method", "model"), PAIRS)
def test_names_logits_and_gradients_are_those_of_peft(method: str, model: str, padding: str) -> None:
    mine, theirs = adapted(inlay, method, model), adapted_there(method, model)
    trained = {n: p for n, p in mine.named_parameters() if p.requires_grad and n.startswith("prompt_encoder")}
    wanted = {
        n: p for n, p in theirs.named_parameters() if p.requires_grad and n.startswith("prompt_encoder")
    }
    assert {n: p.shape for n, p in trained.items()} == {n: p.shape for n, p in wanted.items()}
    given = inputs(model, padding=padding)
    y, z = output(mine(**given)), output(theirs(**given))
    torch.testing.assert_close(y, z, atol=2e-5, rtol=1e-4)
    weights = torch.randn(y.shape)
    (y * weights).sum().backward()
    (z * weights).sum().backward()
    for name, p in trained.items():
        torch.testing.assert_close(p.grad, wanted[name].grad, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("method", "model"), [p for p in PAIRS if p[1] not in ("bert", "bert_tagger", "bert_answerer")]
)
def test_losses_are_those_of_peft(method: str, model: str) -> None:
    given = inputs(model, labels=True)
    mine, theirs = adapted(inlay, method, model)(**given).loss, adapted_there(method, model)(**given).loss
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("method", "model"), [p for p in PAIRS if p[1] in (*CAUSAL, "t5", "bart")])
def test_generated_ids_are_those_of_peft(method: str, model: str) -> None:
    given = inputs(model, batch=3)
    given.pop("labels", None)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    mine, theirs = (adapted(library, method, model) for library in (inlay, peft))
    asked: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    wanted = theirs.generate(**given, **asked)
    if method in PREFIXES and model in ("t5", "bart"):
        # With transformers 4 PEFT's generation is not that of its own forward passes, so these are the measure.
        wanted = wanted[:, :1]
        for _ in range(8):
            logits = theirs(**given, decoder_input_ids=wanted).logits
            wanted = torch.cat([wanted, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(mine.generate(**given, **asked), wanted)


@pytest.mark.parametrize(("method", "model"), PAIRS)
def test_files_load_in_either_library(method: str, model: str, tmp_path: Path) -> None:
    mine, theirs = adapted(inlay, method, model), adapted_there(method, model)
    given = inputs(model)
    mine.save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "theirs")
    one, other = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("mine", "theirs"))
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], atol=1e-6, rtol=1e-5)
    said, heard = (
        json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("mine", "theirs")
    )
    assert said.keys() == heard.keys()
    if said["modules_to_save"]:  # PEFT names the heads twice
        said["modules_to_save"], heard["modules_to_save"] = (
            sorted(set(c["modules_to_save"])) for c in (said, heard)
        )
    assert said == heard
    read_here = inlay.PeftModel.from_pretrained(build(model), tmp_path / "theirs")
    read_there = peft.PeftModel.from_pretrained(build(model), tmp_path / "mine").eval()
    wanted = output(theirs(**given))
    torch.testing.assert_close(output(read_here(**given)), wanted, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(output(read_there(**given)), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "config", ["PromptLearningConfig", "PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"]
)
def test_configurations_have_the_fields_and_defaults_of_peft(config: str) -> None:
    mine, theirs = (getattr(library, config)(num_virtual_tokens=4).to_dict() for library in (inlay, peft))
    assert mine == {k: getattr(v, "value", v) for k, v in theirs.items()}


@pytest.mark.parametrize("name", ["PromptTuningInit", "PromptEncoderReparameterizationType"])
def test_enums_have_the_members_of_peft(name: str) -> None:
    mine, theirs = ({m.name: m.value for m in getattr(library, name)} for library in (inlay, peft))
    assert mine == theirs


@pytest.mark.parametrize("method", METHODS)
def test_get_prompt_is_that_of_peft(method: str) -> None:
    mine, theirs = (adapted(library, method, "llama").get_prompt(2) for library in (inlay, peft))
    if method in PREFIXES:
        for a, b in zip(mine.layers, theirs.layers, strict=True):
            torch.testing.assert_close(a.keys, b.keys)
            torch.testing.assert_close(a.values, b.values)
    else:
        torch.testing.assert_close(mine, theirs)
        assert mine.shape == (2, TOKENS, 16)


def test_zero_is_where_peft_starts_with_it() -> None:
    for projection in (False, True):
        settings = {"init_weights": "zero", "prefix_projection": projection}
        mine, theirs = (
            library.get_peft_model(build("llama"), configuration(library, "prefix", "llama", **settings))
            for library in (inlay, peft)
        )
        given = inputs("llama")
        torch.testing.assert_close(
            output(mine.eval()(**given)), output(theirs.eval()(**given)), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_saved_by_peft_is_trained_on_where_its_file_is_all(method: str, tmp_path: Path) -> None:
    theirs = adapted(peft, method, "llama")
    theirs.save_pretrained(tmp_path)
    if method in ("p-tuning", "p-tuning-lstm", "prefix-projection"):
        base = build("llama")
        before = {k: v.clone() for k, v in base.state_dict().items()}
        with pytest.raises(inlay.AdapterFileError, match="not the network that computes it"):
            inlay.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
        assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
        assert all(p.requires_grad for p in base.parameters())
        assert base.config._attn_implementation == "sdpa"
        return
    mine = inlay.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    given = inputs("llama", labels=True)
    mine(**given).loss.backward()
    torch.optim.SGD(mine.prompt_encoder.parameters(), lr=0.1).step()
    assert not torch.equal(
        mine.prompt_encoder["default"].embedding.weight, theirs.prompt_encoder["default"].embedding.weight
    )


def test_a_text_starts_a_prompt_as_in_peft(with_tokenizer: Callable[[str], Path]) -> None:
    folder = str(with_tokenizer("stories260K-llama"))
    settings = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "Once upon a time",
        "tokenizer_name_or_path": folder,
        "num_virtual_tokens": 20,
    }
    started = []
    for library in (inlay, peft):
        base = build("llama")
        base.resize_token_embeddings(512)
        with torch.no_grad():
            base.get_input_embeddings().weight.copy_(torch.arange(512.0)[:, None].expand(-1, 16))
        model = library.get_peft_model(base, configuration(library, "prompt-tuning", "llama", **settings))
        started.append(model.prompt_encoder["default"].embedding.weight)
    assert torch.equal(*started) and len(started[0].unique()) > 3
