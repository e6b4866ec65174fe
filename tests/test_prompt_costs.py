"""What prefixes do not cost: a whole gradient for each layer, and a mask for each layer."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from inlay import PrefixTuningConfig, get_peft_model
from prompt_models import build


def model_of(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(
        build(name).train(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", **settings)
    )


def loss_of(model: Any) -> Tensor:
    ids = torch.arange(10, 22).view(2, 6)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def parts(encoder: Any) -> list[Tensor]:
    """Return the first block of every parameter that is cut."""
    return [cut.blocks[0] for _, cut in sorted(encoder.cuts.items())]


PROJECTED = pytest.mark.parametrize("projected", [False, True], ids=["flat", "projected"])


@PROJECTED
def test_one_cut_serves_all_layers_until_a_parameter_changes(projected: bool) -> None:
    model = model_of("gpt2", prefix_projection=projected)
    encoder = model.prompt_encoder["default"]
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.5)
    loss_of(model).backward()
    first = parts(encoder)
    once = [p.grad.clone() for p in encoder.parameters()]
    loss_of(model).backward()
    assert len(first) == (2 if projected else 1)
    assert all(a is b for a, b in zip(first, parts(encoder), strict=True))
    for p, grad in zip(encoder.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)
    before = loss_of(model)
    optimizer.step()
    after = loss_of(model)
    assert not any(a is b for a, b in zip(first, parts(encoder), strict=True))
    assert after < before
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model), after.detach())


@PROJECTED
def test_a_model_in_training_is_copied_pickled_and_cast(projected: bool) -> None:
    model = model_of("gpt2", prefix_projection=projected)
    loss_of(model).backward()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = copy.deepcopy(model), torch.load(file, weights_only=False)
    for twin in twins:
        for p in twin.parameters():
            p.grad = None
        loss_of(twin).backward()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad)
    wide = model.double()
    wide.zero_grad()
    loss_of(wide).backward()
    assert all(cut.blocks[0].dtype == torch.float64 for cut in wide.prompt_encoder["default"].cuts.values())


def test_frozen_prefixes_and_prefixes_thawed_again() -> None:
    model = model_of("gpt2")
    weight = model.prompt_encoder["default"].embedding.weight
    loss_of(model).backward()
    weight.requires_grad_(False)
    assert not loss_of(model).requires_grad
    weight.requires_grad_(True)
    weight.grad = None
    loss_of(model).backward()
    assert weight.grad is not None


def test_all_layers_share_one_causal_mask() -> None:
    model = model_of("gpt2").eval()
    with torch.inference_mode():
        want = loss_of(model)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = loss_of(model.train())
    loss.backward()
    masks = [t for t in kept if t.shape[-2:] == (6, 9) and t.is_floating_point() and bool(t.isinf().any())]
    assert len(masks) == 3 and len({t.untyped_storage().data_ptr() for t in masks}) == 1
    torch.testing.assert_close(loss.detach(), want)


def test_a_model_that_has_returned_keeps_no_mask() -> None:
    """A mask of a long text takes more memory than all that is trained."""
    model = model_of("gpt2")
    with torch.no_grad():
        loss_of(model)
    assert model.base_model.prompts.kept_mask is None
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 6), 10_000))
    assert model.base_model.prompts.kept_mask is None


def test_what_is_kept_of_a_run_without_values_is_not_used_with_values() -> None:
    model, ids = model_of("gpt2").eval(), torch.arange(10, 22).view(2, 6)
    want = model(input_ids=ids).logits
    model.prompt_encoder["default"].cuts.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(input_ids=torch.zeros(2, 6, dtype=torch.long))
    assert torch.equal(model(input_ids=ids).logits, want)
