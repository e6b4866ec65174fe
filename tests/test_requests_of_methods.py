"""Values of configurations that a tired person gives: each is one clear error, and none is taken for something else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from inlay import (
    BottleneckConfig,
    FusionConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ReftConfig,
    get_peft_model,
)
from inlay.errors import PeftWarning

WRONG: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (BottleneckConfig, {"parallel": "False"}, "parallel='False' must be True or False"),
    (BottleneckConfig, {"ln_before": "yes"}, "ln_before='yes' must be True or False"),
    (BottleneckConfig, {"dropout": "0.1"}, "dropout='0.1' must be a number of at least 0 and below 1"),
    (BottleneckConfig, {"scaling": math.nan}, "scaling=nan must be a finite number"),
    (BottleneckConfig, {"reduction_factor": "16"}, "reduction_factor='16' must be a positive number"),
    (BottleneckConfig, {"leave_out": 1}, "leave_out=1 must be a list of numbers of blocks"),
    (BottleneckConfig, {"leave_out": [True]}, r"leave_out=\[True\] must be a list of numbers of blocks"),
    (BottleneckConfig, {"target_modules": []}, "target_modules=.* names no module"),
    (ReftConfig, {"orthogonality": "no"}, "orthogonality='no' must be True or False"),
    (ReftConfig, {"dropout": "0.1"}, "dropout='0.1' must be a number"),
    (ReftConfig, {"layers": 3}, "layers=3 must be 'all' or a list"),
    (PrefixTuningConfig, {"prefix_projection": "no"}, "prefix_projection='no' must be True or False"),
    (
        PromptEncoderConfig,
        {"encoder_hidden_size": 0},
        "encoder_hidden_size=0 must be a positive whole number",
    ),
    (PromptEncoderConfig, {"encoder_num_layers": 0}, "encoder_num_layers=0 must be a positive whole number"),
    (FusionConfig, {"members": "ab"}, "members='ab' must be a list of adapters' names"),
]


@pytest.mark.parametrize(
    ("make", "values", "told"), WRONG, ids=lambda x: str(x) if isinstance(x, dict) else ""
)
def test_a_wrong_value_is_one_clear_error(
    make: Callable[..., Any], values: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        make(**values)


@pytest.mark.parametrize(
    ("make", "values", "needs"),
    [
        (PromptEncoderConfig, {"num_virtual_tokens": 2, "encoder_dropout": 0.2}, "type='LSTM'"),
        (PromptTuningConfig, {"num_virtual_tokens": 2, "prompt_tuning_init_text": "sort it"}, "init='TEXT'"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "shared_gating": False}, "use_gating=True"),
        (BottleneckConfig, {"phm_dim": 2}, "phm_layer=True"),
    ],
)
def test_a_field_without_effect_is_not_ignored_in_silence(
    make: Callable[..., Any], values: dict[str, Any], needs: str
) -> None:
    *_, (name, value) = values.items()
    with pytest.warns(PeftWarning, match=f"{name}={value!r} has no effect; it is for .*{needs}"):
        make(**values)


def test_blocks_to_leave_out_may_be_a_range() -> None:
    assert BottleneckConfig(leave_out=range(2)).to_dict()["leave_out"] == [0, 1]  # type: ignore[arg-type]


def test_blocks_that_there_are_not_are_refused() -> None:
    model = bert()
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(
        ValueError, match=r"reduction_factor names blocks \['7'\] that there are not: the model has 2"
    ):
        get_peft_model(model, BottleneckConfig(reduction_factor={"7": 8, "default": 4}))
    assert [name for name, _ in model.named_modules()] == modules


@pytest.mark.parametrize("skipped", [1, "0", ["0"]])
def test_blocks_to_skip_must_be_numbers(skipped: Any) -> None:
    model = get_peft_model(bert(), BottleneckConfig())
    with pytest.raises(ValueError, match=r"skip_layers=.* must be numbers of blocks"):
        model.set_adapter("default", skip_layers=skipped)
    assert not model.base_model.switch.setting.skip_layers


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=9, **sizes))
