"""Modes of freeze_delta on real layers, against MindPet's own network, and the counts of its table on the shapes of real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from inlay import freeze_delta
from inlay.mindpet import (
    AdapterDense,
    AdapterLayer,
    LoRADense,
    LowRankAdapterDense,
    LowRankAdapterLayer,
    PrefixEncoder,
    PrefixLayer,
)
from mindpet.mindpet_cases import INDICES, inlay_name

MODES = ("lora", "adapter", "low_rank_adapter", "prefixtuning", "ptuning2", "bitfit")
BERT_BASE_CHINESE = 102_267_648
HEAD = 768 * 15 + 15


def network() -> nn.Module:
    """The network of the goldens, in PyTorch."""
    block = nn.ModuleDict(
        {
            "query": LoRADense(4, 4, 2, 4),
            "value": LoRADense(4, 4, 2, 4, has_bias=False),
            "key": nn.Linear(4, 4),
            "out": AdapterDense(4, 4, bottleneck_size=2),
            "ffn": LowRankAdapterDense(4, 4, reduction_factor=2),
            "prefix": PrefixLayer(4, 2, 2, 4, 3, 5),
            "layernorm": nn.LayerNorm(4),
        }
    )
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(7, 4),
            "blocks": nn.ModuleList([block]),
            "prefix_encoder": PrefixEncoder(3, 1, 2, 2, True, 5, 0.0),
            "pooler": nn.Linear(4, 4),
            "cls_head": nn.Linear(4, 3),
        }
    )


def names_of(mindpet_names: list[str]) -> set[str]:
    spelt = {"layernorm.gamma": "layernorm.weight", "layernorm.beta": "layernorm.bias"}
    names = {inlay_name(n) for n in mindpet_names if n.rpartition(".")[2] not in INDICES}
    for old, new in spelt.items():
        names = {name.replace(old, new) for name in names}
    return names


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((shared / "goldens" / "mindpet" / "freeze.json").read_text())
    return values


def test_the_network_has_the_parameters_of_mindpets(golden: dict[str, Any]) -> None:
    assert set(dict(network().named_parameters())) == names_of([p["name"] for p in golden["parameters"]])


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_is_trained_as_in_mindpet(golden: dict[str, Any], mode: str, with_head: bool) -> None:
    title = f"mode {mode} + exclude head" if with_head else f"mode {mode}"
    (case,) = (case for case in golden["cases"] if case["title"] == title)
    report = freeze_delta(network(), mode, exclude=["*head*"] if with_head else None)
    assert set(report.trainable) == names_of(case["trainable"])
    assert report.count == case["n_trainable_params"]


def test_modes_are_switched() -> None:
    """MindPet's second mode leaves nothing trainable."""
    model = network()
    fresh = {mode: set(freeze_delta(network(), mode).trainable) for mode in MODES}
    for mode in (*MODES, *reversed(MODES)):
        assert set(freeze_delta(model, mode).trainable) == fresh[mode] != set()


@pytest.mark.parametrize("mode", ["lora", "adapter", "low_rank_adapter"])
def test_only_what_the_mode_names_is_changed_by_training(mode: str) -> None:
    model = nn.Sequential(
        LoRADense(4, 6, 2, 4, lora_b_init="normal"), AdapterDense(6, 8), LowRankAdapterDense(8, 4)
    )
    report = freeze_delta(model, mode)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(report.trainable)


def test_layers_freeze_nothing_by_themselves() -> None:
    assert all(p.requires_grad for p in network().parameters())


# ---------------------------------------------------------------------- the table


def bert() -> tf.BertModel:
    config = tf.BertConfig(vocab_size=21128)
    model = tf.BertModel(config)
    assert sum(p.numel() for p in model.parameters()) == BERT_BASE_CHINESE
    return model


def with_head(model: nn.Module) -> nn.Module:
    return nn.ModuleDict({"bert": model, "head": nn.Linear(768, 15)})


@pytest.mark.parametrize(
    ("mode", "head", "count", "percent"),
    [
        ("lora", False, 294_912, "0.2883"),
        ("lora", True, 306_447, "0.2996"),
        ("adapter", False, 2_379_264, "2.3262"),
        ("adapter", True, 2_390_799, "2.3375"),
        ("low_rank_adapter", False, 57_024, "0.0558"),
        ("low_rank_adapter", True, 68_559, "0.0670"),
    ],
)
def test_counts_on_bert_base_chinese(mode: str, head: bool, count: int, percent: str) -> None:
    with torch.device("meta"):
        model = bert()
        for layer in model.encoder.layer:
            if mode == "lora":
                for name in ("query", "value"):
                    setattr(layer.attention.self, name, LoRADense(768, 768, 8, 16))
            else:
                make = AdapterDense if mode == "adapter" else LowRankAdapterDense
                sizes = {"bottleneck_size": 64} if mode == "adapter" else {"reduction_factor": 32}
                layer.attention.output.dense = make(768, 768, **sizes)
                layer.output.dense = make(3072, 768, **sizes)
        report = freeze_delta(with_head(model), mode, exclude=["head.*"] if head else None)
    assert report.count == count
    assert report.total == BERT_BASE_CHINESE + HEAD + count - HEAD * head
    assert f"{100 * count / (BERT_BASE_CHINESE + HEAD):.4f}" == percent


def test_counts_of_single_layers_on_bert() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in AdapterLayer(768).parameters()) == 99_136
        assert sum(p.numel() for p in LowRankAdapterLayer(768, 32).parameters()) == 2_376
        prefix = PrefixLayer(10, 1, 20, 1280, 512)
        assert sum(p.numel() for p in prefix.parameters()) == 924_416


@pytest.mark.parametrize(
    ("groups", "projection", "count", "percent"),
    [(2, 0, 1_835_008, "0.0294"), (32, 0, 29_360_128, "0.4702"), (2, 128, 5_519_488, "0.0884")],
)
def test_counts_on_glm2_6b(groups: int, projection: int, count: int, percent: str) -> None:
    """28 layers, heads of 128; keys and values have 2 groups, and 32 heads would be sixteen times as many."""
    with torch.device("meta"):
        encoder = PrefixEncoder(128, 28, groups, 128, bool(projection), projection, 0.1)
    report = freeze_delta(encoder, "ptuning2")
    assert report.count == count
    assert f"{100 * count / 6_243_584_000:.4f}" == percent


def test_a_bert_with_adapters_of_zero_is_the_bert_it_was() -> None:
    """Layers that are set into a model of transformers and loaded from it by name."""
    config = tf.BertConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)  # fmt: skip
    model = tf.BertModel(config).eval()
    ids = torch.randint(0, 50, (2, 7))
    wanted = model(input_ids=ids).last_hidden_state
    for layer in model.encoder.layer:
        for parent in (layer.attention.output, layer.output):
            old = parent.dense
            parent.dense = AdapterDense(old.in_features, old.out_features, bottleneck_size=4)
            parent.dense.load_state_dict(old.state_dict(), strict=False)
            nn.init.zeros_(parent.dense.mindpet_delta_adapter.mindpet_delta_adapter_block[2].weight)
    torch.testing.assert_close(model(input_ids=ids).last_hidden_state, wanted)
    freeze_delta(model, "adapter")
    model(input_ids=ids).last_hidden_state.square().sum().backward()
    assert {("mindpet_delta_adapter" in n) for n, p in model.named_parameters() if p.grad is not None} == {
        True
    }
