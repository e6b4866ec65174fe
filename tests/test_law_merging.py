"""Merging, for every method on every kind of layer: one after the other, for good, and undone bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch

from inlay import PeftModel
from law_cases import PAIR_IDS, PAIRS, KindCase, MethodCase
from law_checks import assert_close, assert_unchanged, snapshot
from law_reference import adapted, add

each_pair = pytest.mark.parametrize(("method", "kind"), PAIRS, ids=PAIR_IDS)
IN_ALL_DTYPES = {"linear", "gpt2_conv1d", "conv2d_groups", "embedding", "mha", "experts"}
MERGED = [
    (method, kind, dtype)
    for method, kind in PAIRS
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype == torch.bfloat16 or kind.name in IN_ALL_DTYPES
]


@pytest.mark.parametrize(
    ("method", "kind", "dtype"), MERGED, ids=lambda v: getattr(v, "name", str(v).removeprefix("torch."))
)
def test_unmerging_restores_the_base_bit_for_bit(
    method: MethodCase, kind: KindCase, dtype: torch.dtype
) -> None:
    model = adapted(method, kind, dtype)
    add(model, "other", method, kind)
    before = snapshot(model)
    for first, second in [
        (("default",), ()),
        (("default",), ("other",)),
        (("other", "default"), ("default",)),
        (("other",), ("default", "other")),
    ]:
        model.merge_adapter(list(first))
        if second:
            model.merge_adapter(list(second))
        model.unmerge_adapter()
        assert_unchanged(before, model)


@each_pair
def test_adapters_merge_one_after_the_other_as_they_do_at_once(method: MethodCase, kind: KindCase) -> None:
    model, x = adapted(method, kind), kind.inputs()
    add(model, "other", method, kind)
    model.set_adapter(["default", "other"])
    wanted = model(x)
    model.merge_adapter(["default", "other"])
    at_once = model(x)
    assert_close(at_once, wanted, torch.float32)
    model.merge_adapter()
    assert torch.equal(model(x), at_once), "merging what is merged changed something"
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert_close(model(x), wanted, torch.float32)
    layer = next(iter(model.base_model.layers()))
    assert layer.merged and layer.merged_adapters == ["default", "other"]


@each_pair
def test_merging_for_good_leaves_a_plain_model(method: MethodCase, kind: KindCase) -> None:
    bare, x = kind.build(), kind.inputs()
    model = adapted(method, kind)
    wanted = model(x)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(merged(x), wanted, torch.float32)
    assert_close(copy.deepcopy(model).merge_and_unload(safe_merge=True)(x), wanted, torch.float32)
    assert [(path, type(m)) for path, m in merged.named_modules()] == [
        (path, type(m)) for path, m in bare.named_modules()
    ]
    assert not any(p.requires_grad for p in merged.parameters())
    model.merge_adapter()
    assert_close(model.merge_and_unload()(x), wanted, torch.float32)


@each_pair
def test_a_broken_adapter_is_not_merged(method: MethodCase, kind: KindCase) -> None:
    model = adapted(method, kind)
    broken = [p for p in model.parameters() if p.requires_grad][-1]
    with torch.no_grad():
        broken.fill_(torch.nan)
    before = snapshot(model)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert_equal_but_nan(before, model)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert_equal_but_nan(before, model)


def assert_equal_but_nan(before: dict[str, object], model: PeftModel) -> None:
    for state in (before, now := snapshot(model)):
        state["tensors"] = {k: (i, v.nan_to_num(7.0), f) for k, (i, v, f) in state["tensors"].items()}  # type: ignore[attr-defined]
    assert now["modules"] == before["modules"]
    assert {k: (i, f) for k, (i, _, f) in now["tensors"].items()} == {
        k: (i, f) for k, (i, _, f) in before["tensors"].items()
    }  # type: ignore[attr-defined]
    assert all(torch.equal(v, now["tensors"][k][1]) for k, (_, v, _) in before["tensors"].items())  # type: ignore[attr-defined]


@each_pair
def test_a_merged_model_can_be_copied_and_unmerged(method: MethodCase, kind: KindCase) -> None:
    model = adapted(method, kind)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    model.merge_adapter()
    copied = copy.deepcopy(model)
    copied.unmerge_adapter()
    for key, p in copied.named_parameters():
        assert torch.equal(p, before[key]), key


@each_pair
def test_a_merged_model_can_be_moved_and_unmerged(method: MethodCase, kind: KindCase) -> None:
    model = adapted(method, kind)
    base = {key: p.detach().clone() for key, p in model.named_parameters()}
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    for key, p in model.named_parameters():
        assert p.dtype == torch.float64 and torch.equal(p, base[key].double()), key
