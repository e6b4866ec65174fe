"""Arguments and inputs: what MindPet accepts and refuses, where Inlay differs on purpose, and what messages say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inlay import mindpet
from inlay.mindpet import (
    AdapterDense,
    AdapterLayer,
    LoRADense,
    LowRankAdapterDense,
    LowRankAdapterLayer,
    PrefixEncoder,
    PrefixLayer,
)

USUAL: dict[str, dict[str, Any]] = {
    "LoRADense": {"in_channels": 4, "out_channels": 3, "lora_rank": 2, "lora_alpha": 4},
    "AdapterLayer": {"hidden_size": 8, "bottleneck_size": 4},
    "AdapterDense": {"in_channels": 4, "out_channels": 3, "bottleneck_size": 2},
    "LowRankAdapterLayer": {"hidden_size": 8, "reduction_factor": 2},
    "LowRankAdapterDense": {"in_channels": 4, "out_channels": 6, "reduction_factor": 2},
    "PrefixLayer": {"prefix_token_num": 4, "batch_size": 2, "num_heads": 2, "hidden_dim": 6, "embed_dim": 5},
    "PrefixEncoder": {
        "pre_seq_len": 3, "num_layers": 2, "num_heads": 2, "kv_channels": 4,
        "prefix_projection": True, "projection_dim": 5, "dropout_prob": 0.1,
    },
}  # fmt: skip
OK = "OK"
DIFFERENT = {
    "LoRADense({'lora_alpha': nan})": "ValueError",
    "LoRADense({'lora_dropout': 0})": OK,
    "LoRADense({'activation': 'nope'})": "ValueError",
    "LoRADense({'param_init_type': mindspore.float64})": OK,
    "AdapterLayer({'non_linearity': 'nope'})": "ValueError",
    "AdapterLayer({'non_linearity': 'GELU'})": "ValueError",
    "AdapterLayer({'non_linearity': ReLU()})": OK,
    "AdapterLayer({'non_linearity': 'threshold'})": "ValueError",
    "AdapterLayer({'non_linearity': 'selu'})": "ValueError",
    "AdapterLayer({'non_linearity': 'celu'})": "ValueError",
    "AdapterLayer({'param_init_type': mindspore.float64})": OK,
    "AdapterLayer({'compute_dtype': mindspore.bfloat16})": OK,
    "AdapterDense({'activation': 'nope'})": "ValueError",
    "AdapterDense({'non_linearity': 'x'})": "ValueError",
    "LowRankAdapterLayer({'non_linearity': 'nope'})": "ValueError",
    "LowRankAdapterDense({'activation': 'nope'})": "ValueError",
    "PrefixLayer({'dropout_rate': 0})": OK,
    "PrefixEncoder({'dropout_prob': 0})": OK,
    "PrefixEncoder({'prefix_projection': 'yes'})": "TypeError",
    "LoRADense int input": "TypeError",
    "LowRankAdapterLayer forward on MindSpore 2.7 unpatched": OK,
}
"""Calls with another outcome than in MindPet; the documentation of ``inlay.mindpet`` says why."""
OTHER_CALLS: dict[str, Callable[[], object]] = {
    "LoRADense call 1-D": lambda: LoRADense(4, 3, 2, 4)(torch.ones(4)),
    "LoRADense call wrong width": lambda: LoRADense(4, 3, 2, 4)(torch.ones(2, 5)),
    "LoRADense int input": lambda: LoRADense(4, 3, 2, 4)(torch.ones(2, 4, dtype=torch.int32)),
    "LowRankAdapterLayer without reduction_factor": lambda: LowRankAdapterLayer(8),  # type: ignore[call-arg]
    "LowRankAdapterLayer forward on MindSpore 2.7 unpatched": lambda: LowRankAdapterLayer(8, 2)(
        torch.ones(2, 8)
    ),
    "PrefixEncoder(batch 0)": lambda: PrefixEncoder(**USUAL["PrefixEncoder"])(0),
    "PrefixEncoder(batch 2)": lambda: PrefixEncoder(**USUAL["PrefixEncoder"])(2),
}
NOT_HERE = ("RDrop", "LoRADense activation str attr act_name")
"""R-Drop's are in test_r_drop.py; the attribute is for ``shard``, which there is none of."""


def arguments_of(call: str) -> tuple[str, dict[str, Any]]:
    """Return the layer of a recorded call, and the arguments that it changes, in PyTorch's objects."""
    layer, changes = call[:-1].split("(", 1)
    changes = re.sub(r"Tensor\(shape=(\[[\d, ]+\]),.*\)(?=\}$)", r"torch.zeros(\1)", changes, flags=re.DOTALL)
    changes = re.sub(r"Prim\[ReLU\]|ReLU\(\)", "torch.nn.ReLU()", changes)
    changes = re.sub(r"<.*Normal object.*>", "torch.nn.init.normal_", changes)
    return layer, eval(changes, {"torch": torch, "mindspore": torch, "nan": math.nan})


def outcome(call: str) -> str:
    """Return OK or the name of the error, after a look at the message."""
    if call in OTHER_CALLS:
        try:
            OTHER_CALLS[call]()
        except (TypeError, ValueError) as error:
            return type(error).__name__
        return OK
    layer, changes = arguments_of(call)
    try:
        getattr(mindpet, layer)(**USUAL[layer] | changes)
    except (TypeError, ValueError) as error:
        ((argument, value),) = changes.items()
        shown = str(list(value.shape)) if isinstance(value, Tensor) and "shape" in str(error) else str(value)
        assert argument in str(error)
        assert shown in str(error) or type(value).__name__ in str(error) or argument == "foo", str(error)
        return type(error).__name__
    return OK


def test_calls_end_as_in_mindpet_or_as_documented(shared: Path) -> None:
    recorded = json.loads((shared / "goldens" / "mindpet" / "validation.json").read_text())
    recorded = [(call, told) for call, told in recorded if not call.startswith(NOT_HERE)]
    assert len(recorded) == 106
    wanted = {call: DIFFERENT.get(call, told.split(":")[0]) for call, told in recorded}
    assert {call: outcome(call) for call in wanted} == wanted
    as_in_mindpet = {call: told.split(":")[0] for call, told in recorded}
    assert all(as_in_mindpet[call] != told for call, told in DIFFERENT.items()), "no difference"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LoRADense(4, 3, 0, 4), ValueError, "LoRADense: lora_rank=0 must be at least 1"),
        (
            lambda: LoRADense(4, 3, 2.0, 4),  # type: ignore[arg-type]
            TypeError,
            r"LoRADense: lora_rank must be an int of at least 1, not 2.0 \(float\)",
        ),
        (
            lambda: LoRADense(4, 3, 2, math.inf),
            ValueError,
            "lora_alpha=inf must be finite and other than zero",
        ),
        (lambda: LoRADense(4, 3, 2, 4, 1.0), ValueError, r"lora_dropout=1.0 is not a probability in \[0, 1\)"),
        (lambda: LoRADense(4, 3, 2, 4, math.nan), ValueError, "lora_dropout=nan is not a probability"),
        (
            lambda: LoRADense(4, 3, 2, 4, compute_dtype=torch.int8),
            TypeError,
            "compute_dtype must be one of torch.float16, .*not torch.int8",
        ),
        (
            lambda: LoRADense(4, 3, 2, 4, lora_a_init=torch.zeros(3, 4)),
            ValueError,
            r"the shape of lora_a_init must be \[2, 4\], not \[3, 4\]",
        ),
        (
            lambda: LoRADense(4, 3, 2, 4, lora_a_init="xavier_unifrom"),
            ValueError,
            "lora_a_init='xavier_unifrom' is unknown; did you mean 'xavier_uniform'",
        ),
        (
            lambda: LoRADense(4, 3, 2, 4, bias_init="he_uniform"),
            ValueError,
            r"bias_init='he_uniform' does not suit the shape \[3\]",
        ),
        (lambda: LoRADense(4, 3, 2, 4, lora_b_init=True), TypeError, r"not True \(bool\)"),
        (lambda: LoRADense(4, 3, 2, 4, lora_b_init=None), TypeError, "lora_b_init must be a name, a number"),  # type: ignore[arg-type]
        (
            lambda: LoRADense(4, 3, 2, 4, activation="Gelu"),
            ValueError,
            "activation='Gelu' is unknown; did you mean 'gelu'",
        ),
        (
            lambda: LoRADense(4, 3, 2, 4, activation=nn.ReLU),
            TypeError,
            r"activation=ReLU is a class; pass an object: ReLU\(\)",
        ),
        (lambda: LoRADense(4, 3, 2, 4, activation=3), TypeError, r"activation must be a name, .*not 3 \(int\)"),  # type: ignore[arg-type]
        (
            lambda: AdapterLayer(8, non_linearity="threshold"),
            ValueError,
            r"pass torch.nn.Threshold\(threshold, value\)",
        ),
        (
            lambda: AdapterLayer(8, non_linearity=None),  # type: ignore[arg-type]
            TypeError,
            "AdapterLayer: non_linearity must be a name",
        ),
        (
            lambda: LowRankAdapterLayer(8, 9),
            ValueError,
            "reduction_factor=9 must be at most hidden_size=8",
        ),
        (
            lambda: LowRankAdapterDense(4, 6, reduction_factor=7),
            ValueError,
            "LowRankAdapterDense: reduction_factor=7 must be at most out_channels=6",
        ),
        (
            lambda: LowRankAdapterLayer(8, 2, low_rank_w_init=torch.zeros(8, 1)),  # type: ignore[arg-type]
            TypeError,
            "low_rank_w_init must be a name or a function",
        ),
        (
            lambda: PrefixLayer(5, 2, 2, 6, 5),
            ValueError,
            "prefix_token_num=5 must be a multiple of batch_size=2.*pass 1",
        ),
        (
            lambda: PrefixLayer(4, 1, 5, 6, 5).for_attention(2),
            ValueError,
            "hidden_dim=6 cannot be split into num_heads=5",
        ),
        (
            lambda: PrefixEncoder(3, 2, 2, 4, False, 0, 0.0, parallel_config={}),
            ValueError,
            "parallel_config is MindSpore's",
        ),
        (
            lambda: PrefixEncoder(3, 2, 2, 4, False, 0, 0.0, out_perm=(0, 1, 2, 3, 4)),
            ValueError,
            r"out_perm=\(0, 1, 2, 3, 4\) must be an order of 0 to 4 that begins with 2",
        ),
        (lambda: PrefixLayer(4, 1, 2, 6, 5).for_attention(-1), ValueError, "PrefixLayer: batch_size=-1 must not"),
        (lambda: PrefixEncoder(3, 2, 2, 4, False, 0, 0.0)(-1), ValueError, "batch_size=-1 must not be negative"),
        (lambda: PrefixEncoder(3, 2, 2, 4, False, 0, 0.0)(2.0), TypeError, "batch_size must be an int, not 2.0"),
        (lambda: PrefixEncoder(3, 2, 2, 4, False, 0, 0.0)(2, torch.int8), TypeError, "dtype must be one of"),
    ],
)  # fmt: skip
def test_messages(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "layer",
    [LoRADense(4, 3, 2, 4), AdapterLayer(4, 2), AdapterDense(4, 3), LowRankAdapterLayer(4, 2), LowRankAdapterDense(4, 3)],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_inputs_that_do_not_fit_are_refused(layer: nn.Module) -> None:
    name = type(layer).__name__
    with pytest.raises(ValueError, match=f"{name}: x must have at least 2 dimensions, not 1"):
        layer(torch.ones(4))
    with pytest.raises(ValueError, match=rf"{name}: the last dimension of x must be 4, not 5 of \[2, 5\]"):
        layer(torch.ones(2, 5))
    with pytest.raises(TypeError, match=f"{name}: x must be floating point, not torch.int64"):
        layer(torch.ones(2, 4, dtype=torch.int64))


def test_arguments_come_in_mindpets_order() -> None:
    lora = LoRADense(4, 3, 2, 8, 0.5, "ones", "ones", torch.bfloat16, torch.float64)
    assert (lora.in_channels, lora.out_channels, lora.lora_rank, lora.lora_alpha) == (4, 3, 2, 8)
    assert (lora.scaling, lora.lora_dropout.p, lora.compute_dtype) == (4.0, 0.5, torch.float64)
    assert bool((lora.mindpet_delta_lora_a == 1).all() and (lora.mindpet_delta_lora_b == 1).all())
    assert {p.dtype for p in lora.parameters()} == {torch.bfloat16}
    dense = AdapterDense(4, 3, "ones", 2.0, True, "relu", 5, "silu", torch.float16, torch.float64)
    assert bool((dense.weight == 1).all() and dense.bias is not None and (dense.bias == 2).all())
    assert isinstance(dense.activation, nn.ReLU)
    block = dense.mindpet_delta_adapter.mindpet_delta_adapter_block
    assert block[0].weight.shape == (5, 3) and isinstance(block[1], nn.SiLU)
    assert (block[2].weight.dtype, block[2].compute_dtype) == (torch.float16, torch.float64)
    low = LowRankAdapterDense(4, 6, "ones", 2.0, False, "relu", 3, 5, "ones", "silu", torch.float16, torch.float64)  # fmt: skip
    assert low.bias is None
    inner = low.mindpet_delta_low_rank_adapter
    down = inner.mindpet_delta_low_rank_adapter_down_sampler
    assert down.mindpet_delta_low_rank_adapter_weight_left.shape == (6, 5)
    assert down.mindpet_delta_low_rank_adapter_weight_right.shape == (5, 2)
    assert bool((down.mindpet_delta_low_rank_adapter_weight_right == 1).all())
    assert isinstance(inner.mindpet_delta_low_rank_adapter_non_linear, nn.SiLU)
    assert (down.bias.dtype, down.compute_dtype) == (torch.float16, torch.float64)
    prefix = PrefixLayer(4, 2, 3, 6, 5, 7, 0.25)
    assert [tuple(p.shape) for p in prefix.parameters()] == [(4, 5), (7, 5), (7,), (6, 7), (6,)]
    assert (prefix.num_heads, prefix.dropout.p) == (3, 0.25)
    encoder = PrefixEncoder(3, 2, 4, 5, True, 6, 0.25)
    assert [tuple(p.shape) for p in encoder.parameters()] == [(3, 80), (6, 80), (6,), (80, 6), (80,)]
    assert encoder.dropout.p == 0.25
