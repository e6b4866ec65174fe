"""Freezing by name and by method: MindPet's own results, the table's counts, and what goes wrong in MindPet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inlay import (
    BitFitConfig,
    FreezeReport,
    PeftError,
    TrainableTokensConfig,
    freeze_delta,
    freeze_from_config,
    freeze_modules,
    get_peft_model,
)
from inlay.training.freezing import ModelConfigFreezeInfoError, ReadYamlFileError
from small_net import Net, config


def trained(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def checked(model: nn.Module, report: FreezeReport) -> FreezeReport:
    """Return a report that says what the model says."""
    assert list(report.trainable) == trained(model)
    assert report.total == sum(p.numel() for p in model.parameters())
    assert report.count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    return report


# ---------------------------------------------------------------------- MindPet


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((shared / "goldens" / "mindpet" / "freeze.json").read_text())
    return values


@pytest.fixture
def network(golden: dict[str, Any]) -> nn.Module:
    """A model with the parameters of MindPet's network."""
    root = nn.Module()
    for told in golden["parameters"]:
        *path, leaf = told["name"].split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        learns = told["initial_requires_grad"]
        kind = torch.float32 if learns else torch.int64
        module.register_parameter(
            leaf, nn.Parameter(torch.zeros(told["shape"], dtype=kind), requires_grad=learns)
        )
    return root


MINDPET = {
    **{
        f"mode {mode}": (mode, {})
        for mode in ("lora", "prefixtuning", "adapter", "low_rank_adapter", "bitfit", "ptuning2")
    },
    **{
        f"mode {mode} + exclude head": (mode, {"exclude": ["*head*"]})
        for mode in ("lora", "prefixtuning", "adapter", "low_rank_adapter", "bitfit", "ptuning2")
    },
    "lora + exclude biases (combination that works)": ("lora", {"exclude": ["*bias"]}),
    "lora + include of lora_b (2nd pass freezes it)": ("lora", {"include": ["*lora_b"]}),
    "lora + include&exclude conflict": ("lora", {"include": ["*query*"], "exclude": ["*query*"]}),
    "error: freeze_delta(net,'lora',include=[]) -> ignored": ("lora", {"include": []}),
    "freeze_modules include only": (None, {"include": ["*embedding*", "blocks.*.weight"]}),
    "freeze_modules include+exclude (conflict untouched)": (
        None,
        {"include": ["blocks*"], "exclude": ["blocks.*.layernorm*", "*lora*"]},
    ),
    "freeze_modules exact name": (None, {"include": ["pooler.weight"]}),
    "fnmatch ? and [] work too": (None, {"include": ["poole?.weight", "blocks.[0-9].key.*"]}),
}


@pytest.mark.parametrize("title", MINDPET)
def test_the_same_is_trained_as_in_mindpet(network: nn.Module, golden: dict[str, Any], title: str) -> None:
    (case,) = (case for case in golden["cases"] if case["title"] == title)
    mode, lists = MINDPET[title]
    report = freeze_modules(network, **lists) if mode is None else freeze_delta(network, mode, **lists)
    checked(network, report)
    assert sorted(report.trainable) == sorted(case["trainable"])
    assert report.count == case["n_trainable_params"]


@pytest.mark.parametrize(
    ("title", "text"),
    [
        (
            "config: include+exclude",
            "freeze:\n  include: ['*']\n  exclude: ['*mindpet_delta_lora*','*head*']\n",
        ),
        (
            "config: params sibling allowed",
            "params:\n  lr: 0.1\nfreeze:\n  include: ['*']\n  exclude: ['*head*']\n",
        ),
        ("config: include null + exclude list", "freeze:\n  include:\n  exclude: ['*head*']\n"),
    ],
)
def test_configurations_of_mindpet(
    network: nn.Module, golden: dict[str, Any], tmp_path: Path, title: str, text: str
) -> None:
    (case,) = (case for case in golden["cases"] if case["title"] == title)
    (path := tmp_path / "freeze.yaml").write_text(text)
    report = checked(network, freeze_from_config(network, str(path)))
    assert sorted(report.trainable) == sorted(case["trainable"])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda net: freeze_modules(123, ["*"]), TypeError),  # type: ignore[arg-type]
        (lambda net: freeze_modules(net), ValueError),
        (lambda net: freeze_modules(net, include="*"), TypeError),  # type: ignore[arg-type]
        (lambda net: freeze_modules(net, include=[]), TypeError),
        (lambda net: freeze_modules(net, include=("*",)), TypeError),  # type: ignore[arg-type]
        (lambda net: freeze_modules(net, include=[1]), TypeError),  # type: ignore[list-item]
        (lambda net: freeze_modules(net, include=["*", 1]), TypeError),  # type: ignore[list-item]
        (lambda net: freeze_modules(net, include=["*"], exclude=[]), TypeError),
        (lambda net: freeze_delta(123, "lora"), TypeError),  # type: ignore[arg-type]
        (lambda net: freeze_delta(net, ""), ValueError),
        (lambda net: freeze_delta(net, "prefix"), ValueError),
        (lambda net: freeze_delta(net, "r_drop"), ValueError),
        (lambda net: freeze_delta(net, None), ValueError),  # type: ignore[arg-type]
        (lambda net: freeze_delta(net, "lora", include="*"), TypeError),  # type: ignore[arg-type]
        (lambda net: freeze_delta(net, "lora", exclude=["*haed*"]), ValueError),
        (lambda net: freeze_modules(net, include=["*"], exclude=["*input_tokens"]), ValueError),
        (lambda net: freeze_from_config(net, 3), TypeError),  # type: ignore[arg-type]
        (lambda net: freeze_from_config(net, ""), ValueError),
    ],
)
def test_errors_are_of_mindpets_types_and_change_nothing(
    network: nn.Module, call: Callable[[nn.Module], Any], error: type[Exception]
) -> None:
    before = trained(network)
    with pytest.raises(error):
        call(network)
    assert trained(network) == before


# ---------------------------------------------------------------------- MindPet's traps


@pytest.mark.parametrize(("mode", "count"), [("LoRA", 32), ("BitFit", 57), ("Low_Rank_Adapter", 18)])
def test_upper_case_works(network: nn.Module, mode: str, count: int) -> None:
    assert checked(network, freeze_delta(network, mode)).count == count


def test_switching_modes_trains_the_new_one(network: nn.Module) -> None:
    for mode, count in (("lora", 32), ("adapter", 22), ("bitfit", 57), ("lora", 32)):
        assert checked(network, freeze_delta(network, mode)).count == count


def test_integers_are_left_alone(network: nn.Module) -> None:
    report = checked(network, freeze_modules(network, exclude=["*prefix*"]))
    assert "blocks.0.prefix.input_tokens" not in report.trainable
    with pytest.raises(ValueError, match="input_tokens', whose integers cannot be trained"):
        freeze_modules(network, exclude=["*input_tokens"])


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("pooler", "did you mean 'pooler.*'?"),
        ("*embeding*", "did you mean '*embedding*'?"),
        ("blocks.0.querry.weight", "did you mean 'blocks.0.query.weight'?"),
        ("key.weight", "did you mean '*key.weight'?"),
        ("qxz", "the model's parameters are embedding.embedding_table, blocks.0.query.weight"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(network: nn.Module, pattern: str, told: str) -> None:
    before = trained(network)
    with pytest.raises(ValueError) as caught:
        freeze_modules(network, include=["*"], exclude=[pattern])
    assert f"exclude pattern {pattern!r} matches no parameter" in str(caught.value)
    assert told in str(caught.value)
    assert trained(network) == before


def test_a_mode_without_parameters_is_an_error() -> None:
    model = Net()
    with pytest.raises(ValueError, match="no parameters of mode 'adapter' to train: it carries no adapter"):
        freeze_delta(model, "adapter")
    adapted = get_peft_model(model, config())
    with pytest.raises(ValueError, match="it carries lora"):
        freeze_delta(adapted, "ptuning2")
    with pytest.raises(ValueError, match=r"unknown mode 'prefix'; did you mean 'prefixtuning'\? \(known: "):
        freeze_delta(adapted, "prefix")


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        (None, ReadYamlFileError, "No such file"),
        ("freeze: [", ReadYamlFileError, "cannot be read as YAML"),
        ("", ModelConfigFreezeInfoError, "needs the key 'freeze'"),
        ("- a\n- b\n", ModelConfigFreezeInfoError, "needs the key 'freeze'"),
        ("params:\n  lr: 0.1\n", ModelConfigFreezeInfoError, "needs the key 'freeze'"),
        ("freeze:\n", ModelConfigFreezeInfoError, "needs the key 'freeze' with a mapping"),
        (
            "freeze:\n  include: ['*']\n  mode: lora\n",
            ModelConfigFreezeInfoError,
            r"keys \['mode'\] under 'freeze'",
        ),
        ("freeze: {}\n", ValueError, "both are None"),
        ("freeze:\n  include: '*'\n", TypeError, "include must be a list"),
        ("freeze:\n  include: []\n", TypeError, "include must be a list with at least one pattern"),
    ],
)
def test_configurations_that_cannot_be_followed(
    tmp_path: Path, text: str | None, error: type[Exception], told: str
) -> None:
    model, path = Net(), tmp_path / "freeze.yaml"
    if text is not None:
        path.write_text(text)
    before = trained(model)
    with pytest.raises(error, match=told):
        freeze_from_config(model, path)
    assert trained(model) == before
    assert issubclass(ReadYamlFileError, (PeftError, OSError))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("freeze:\n  include: ['embed*', 'blocks*']\n", ["head.weight", "head.bias"]),
        ("freeze:\n  exclude: ['head*']\n", None),
    ],
)
def test_either_list_may_be_absent_and_the_file_may_be_a_link(
    tmp_path: Path, text: str, left: list[str] | None
) -> None:
    model = Net()
    (tmp_path / "file.yaml").write_text(text)
    (tmp_path / "link").symlink_to(tmp_path / "file.yaml")
    everything = trained(model)
    report = checked(model, freeze_from_config(model, tmp_path / "link"))
    assert list(report.trainable) == (everything if left is None else left)


# ---------------------------------------------------------------------- models adapted by Inlay


def adapted() -> nn.Module:
    """A model with LoRA, DoRA and trained rows, and a head of its own for each."""
    model = get_peft_model(Net(), config())
    model.add_adapter("dora", config(use_dora=True, modules_to_save=None))
    model.add_adapter("rows", TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed"]))
    return model


def test_a_method_is_all_its_parameters_and_nothing_else() -> None:
    model = adapted()
    dora = {name for name, _ in model.named_parameters() if ".dora" in name}
    lora = {name for name, _ in model.named_parameters() if "lora_" in name} - dora
    rows = {name for name, _ in model.named_parameters() if "trainable_tokens_delta" in name}
    assert dora and lora and rows
    assert set(checked(model, freeze_delta(model, "DORA")).trainable) == dora
    assert set(checked(model, freeze_delta(model, "Trainable_Tokens")).trainable) == rows
    assert set(checked(model, freeze_delta(model, "lora")).trainable) == lora | dora
    only = freeze_delta(model, "lora", include=["*.dora*"], exclude=["*modules_to_save*"])
    assert set(checked(model, only).trainable) == lora | {
        name for name, _ in model.named_parameters() if "modules_to_save" in name
    }


def test_what_is_chosen_gets_gradients() -> None:
    model = get_peft_model(Net(), config())
    freeze_delta(model, "lora")
    model(torch.arange(4)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == trained(model)


# ---------------------------------------------------------------------- biases


class Norms(nn.Module):
    """Biases of every sort, some of normalisation layers."""

    def __init__(self) -> None:
        class RMSNorm(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bias = nn.Parameter(torch.zeros(3))

        class Renamed(nn.LayerNorm):
            pass

        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.recurrent = nn.LSTM(4, 2)
        self.conv = nn.Conv1d(4, 4, 1)
        self.norms = nn.ModuleList(
            [nn.LayerNorm(4), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), RMSNorm(), Renamed(4)]
        )


def test_bitfit_leaves_the_biases_of_normalisation_out_unless_told() -> None:
    model = Norms()
    without = set(checked(model, freeze_delta(model, "bitfit")).trainable)
    assert without == {
        *("attention.in_proj_bias", "attention.out_proj.bias", "conv.bias"),
        *("recurrent.bias_ih_l0", "recurrent.bias_hh_l0"),
    }
    everything = set(checked(model, freeze_delta(model, "bitfit_all")).trainable)
    assert everything == without | {f"norms.{number}.bias" for number in range(5)}


def test_in_a_model_with_a_bitfit_adapter_the_mode_is_that_adapter() -> None:
    model = get_peft_model(Net(), BitFitConfig())
    names = set(checked(model, freeze_delta(model, "BitFit")).trainable)
    assert names == {name for name, _ in model.named_parameters() if "bitfit_bias" in name} != set()


def bert_base_chinese() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig(vocab_size=21128, num_labels=15))


def test_bitfit_counts_of_mindpets_table(shared: Path) -> None:
    told = json.loads((shared / "goldens" / "mindpet" / "table_counts.json").read_text())
    model, names = bert_base_chinese(), told["bitfit_pytorch_naming_warning"]
    report = freeze_delta(model, "bitfit", exclude=["classifier*"])
    assert report.count == 95_247
    assert report.total == told["bert_base_chinese"]["base_plus_head15"] == 102_279_183
    assert f"{report.percent:.4f}" == "0.0931"
    assert str(report).startswith("trains 95,247 of 102,279,183 parameters (0.0931 %)")
    with_norms = freeze_delta(model, "bitfit_all", exclude=["classifier*"])
    assert with_norms.count == names["pytorch_*bias_plus_full_head"] == 114_447


# ---------------------------------------------------------------------- reports


def test_the_report_groups_blocks_and_does_not_change() -> None:
    model = Net()
    report = freeze_modules(model, include=["*"], exclude=["blocks.*.weight", "head.bias"])
    assert str(report).splitlines() == [
        "trains 147 of 249 parameters (59.0361 %)",
        "     2 x blocks.*.q_proj.weight: 72",
        "     2 x blocks.*.v_proj.weight: 72",
        "     1 x head.bias: 3",
    ]
    with pytest.raises(AttributeError):
        report.total = 0  # type: ignore[misc]


def test_tied_parameters_count_once_and_answer_to_every_name() -> None:
    model = Net()
    model.head = nn.Linear(6, 10)
    model.head.weight = model.embed.weight
    report = checked(model, freeze_modules(model, include=["*"], exclude=["head.weight"]))
    assert list(report.trainable) == ["embed.weight"]
