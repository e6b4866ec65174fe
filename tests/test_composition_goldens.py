"""Compositions of bottleneck adapters compute what AdapterHub's ``adapters`` computed: outputs and gradients of recorded cases."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapterhub_goldens import PLACES, Golden, in_inlays_names
from inlay import (
    BatchSplit,
    BottleneckConfig,
    Fuse,
    FusionConfig,
    Parallel,
    PeftModel,
    Stack,
    get_peft_model,
    set_peft_model_state_dict,
)
from inlay.composition import Block

BLOCKS: dict[str, Block] = {
    "compose_stack": Stack("a", "b"),
    "compose_batchsplit": BatchSplit("a", "b", batch_sizes=[1, 1]),
    "compose_parallel": Parallel("a", "b"),
    "compose_fuse": Fuse("a", "b"),
}


CASES = [*(f"bert/{case}" for case in BLOCKS), "gpt2/compose_parallel", "gpt2/compose_fuse"]


def recorded(shared: Path, case: str) -> Golden:
    folder = shared / "goldens" / "adapterhub" / case
    if not folder.is_dir():
        pytest.skip(f"no recorded vectors at {folder}")
    return Golden(folder)


def composed(golden: Golden) -> PeftModel:
    told = BottleneckConfig(
        placement="feedforward", reduction_factor=4, original_ln_before=True, non_linearity="relu"
    )
    model = get_peft_model(golden.base(), told, "a")
    model.add_adapter("b", told)
    tensors = golden.tensors("full_state_dict")
    for name in "ab":
        own = {k.replace(f".{name}.", ".a."): v for k, v in tensors.items() if f".adapters.{name}." in k}
        result = set_peft_model_state_dict(model, in_inlays_names(own, model), name)
        assert own and not result.missing_keys and not result.unexpected_keys, result
    block = BLOCKS[golden.folder.name]
    if isinstance(block, Fuse):
        model.add_adapter("mix", FusionConfig(members=["a", "b"], train_members=True, regularization=0.0))
        result = set_peft_model_state_dict(model, fusion_of(tensors), "mix")
        assert not result.missing_keys and not result.unexpected_keys, result
    model.set_adapter(block)
    return model


def fusion_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the fusion's tensors by Inlay's keys; a bias of the keys has no effect, so there is none here."""
    found = {}
    for key, value in tensors.items():
        match = re.fullmatch(r"(.*)\.adapter_fusion_layer\.a,b\.(query|key|value)\.(weight|bias)", key)
        if match and (match[2], match[3]) != ("key", "bias"):
            path = match[1]
            place = next(
                re.sub(f"^{rule}$", new, f"{path}.adapters")
                for rule, new in PLACES.items()
                if re.fullmatch(rule, f"{path}.adapters")
            )
            found[f"base_model.model.{place}.fusion_{match[2]}.{match[3]}"] = value
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", ["full", "padded"])
def test_outputs(case: str, batch: str, shared: Path) -> None:
    golden = recorded(shared, case)
    model, inputs, expected = composed(golden).eval(), golden.inputs(), golden.tensors("expected")
    mask = inputs[f"{batch}.attention_mask"]
    with torch.no_grad():
        logits = model(input_ids=inputs[f"{batch}.input_ids"], attention_mask=mask).logits
    real = mask.bool().repeat(len(logits) // len(mask), 1)
    torch.testing.assert_close(logits[real], expected[f"{batch}.logits"][real], rtol=0, atol=1e-4)
    model.set_adapter("a")
    alone = model(input_ids=inputs[f"{batch}.input_ids"], attention_mask=mask).logits
    assert (alone - logits[: len(alone)]).abs().max() > 0.1 or golden.folder.name == "compose_parallel"


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_gradients_of_a_fusion(family: str, shared: Path) -> None:
    golden = recorded(shared, f"{family}/compose_fuse")
    model, inputs = composed(golden).train(), golden.inputs()
    wanted = golden.tensors("grads")
    mask = inputs["padded.attention_mask"]
    logits = model(input_ids=inputs["padded.input_ids"], attention_mask=mask).logits
    weight = inputs["loss_weight"].repeat(len(logits) // len(mask), 1, 1)
    loss = (logits * weight).sum()
    loss.backward()
    torch.testing.assert_close(loss.reshape(()), wanted.pop("loss").reshape(()), rtol=1e-4, atol=1e-2)
    found: dict[str, Any] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    expected = {}
    for name in "ab":
        own = {k.replace(f".{name}.", ".a."): v for k, v in wanted.items() if f".adapters.{name}." in k}
        for key, value in in_inlays_names(own, model).items():
            column, _, part = key.rpartition(".")
            expected[f"{column}.{name}.{part}"] = value
    for key, value in fusion_of(wanted).items():
        column, _, part = key.rpartition(".")
        expected[f"{column}.mix.{part}"] = value
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-3 * grad.norm() + 1e-4, name
