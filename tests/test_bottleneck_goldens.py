"""Bottleneck adapters compute what AdapterHub's ``adapters`` computed: outputs and gradients of recorded cases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapterhub_goldens import Golden, in_inlays_names
from inlay import get_peft_model_state_dict

CASES = [
    "bert/seq_bn", "bert/double_seq_bn", "bert/par_bn", "bert/channel_par_bn", "bert/compacter", "bert/compacter_full_W",
    "bert/bn_leave_out_0", "bert/bn_ln_after", "bert/bn_ln_before", "bert/bn_no_ln_after", "bert/bn_residual_after_ln",
    "gpt2/bn_houlsby_scaling2", "gpt2/bn_ln_after", "gpt2/compacter", "gpt2/compacterpp", "gpt2/double_seq_bn",
    "gpt2/par_bn_both_locations", "gpt2/scaled_par_bn", "gpt2/seq_bn_default_rf16",
]  # fmt: skip


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest, shared: Path) -> Golden:
    folder = shared / "goldens" / "adapterhub" / request.param
    if not folder.is_dir():
        pytest.skip(f"no recorded vectors at {folder}")
    return Golden(folder)


@pytest.mark.parametrize("batch", ["full", "padded"])
def test_outputs(golden: Golden, batch: str) -> None:
    model, inputs, expected = golden.model().eval(), golden.inputs(), golden.tensors("expected")
    mask = inputs[f"{batch}.attention_mask"]
    with torch.no_grad():
        logits = model(input_ids=inputs[f"{batch}.input_ids"], attention_mask=mask).logits
        with model.disable_adapter():
            plain = model(input_ids=inputs[f"{batch}.input_ids"], attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected[f"{batch}.logits"][real], rtol=0, atol=5e-5)
    assert (plain - logits).abs().max() > 0.1  # the adapter did something


def test_gradients(golden: Golden) -> None:
    model, inputs, wanted = golden.model().train(), golden.inputs(), golden.tensors("grads")
    logits = model(
        input_ids=inputs["padded.input_ids"], attention_mask=inputs["padded.attention_mask"]
    ).logits
    loss = (logits * inputs["loss_weight"]).sum()
    loss.backward()
    torch.testing.assert_close(loss.reshape(()), wanted.pop("loss").reshape(()), rtol=1e-4, atol=1e-3)
    names = {
        f"base_model.model.{n.removeprefix('base_model.model.')}": p for n, p in model.named_parameters()
    }
    found = {n.replace(".a.", ".").removesuffix(".a"): p.grad for n, p in names.items() if p.requires_grad}
    expected = in_inlays_names(wanted, model)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 4e-4 * grad.norm(), name


def test_count_and_file(golden: Golden, tmp_path: Path) -> None:
    model = golden.model()
    state = get_peft_model_state_dict(model, adapter_name="a")
    assert sum(t.numel() for t in state.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()
