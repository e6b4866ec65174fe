"""What happens to an adapter in its life, for every method on every kind of layer: saved and loaded, resumed, disabled,
deleted, copied, pickled whole. Merging is in ``test_law_merging``."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from inlay import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from law_cases import KINDS, LIFE_IDS, LIVES, METHODS, KindCase, MethodCase
from law_checks import assert_close, assert_unchanged, seeded, snapshot
from law_reference import adapted, add

each_pair = pytest.mark.parametrize(("method", "kind"), LIVES, ids=LIFE_IDS)


@each_pair
def test_a_saved_adapter_is_the_same_when_it_is_loaded(
    method: MethodCase, kind: KindCase, tmp_path: Path
) -> None:
    model, x = adapted(method, kind), kind.inputs()
    add(model, "other", method, kind)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kind.build(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other", low_cpu_mem_usage=True)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(p.is_meta for p in loaded.parameters())
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]
    for (key, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), key
    for name in ("default", "other"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(loaded(x), model(x))
    loaded.save_pretrained(tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


@each_pair
def test_training_resumes_from_a_file(method: MethodCase, kind: KindCase, tmp_path: Path) -> None:
    model, x = adapted(method, kind).train(), kind.inputs()
    model.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(kind.build(), tmp_path, is_trainable=True).train()
    for m in (model, resumed):
        m(x).square().sum().backward()
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.01).step()
    for (key, a), (_, b) in zip(model.named_parameters(), resumed.named_parameters(), strict=True):
        assert a.requires_grad == b.requires_grad and torch.equal(a, b), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_pair
def test_a_disabled_adapter_is_not_there(method: MethodCase, kind: KindCase, dtype: torch.dtype) -> None:
    bare, x = kind.build(dtype), kind.inputs(dtype)
    wanted, model = bare(x), adapted(method, kind, dtype)
    on = model(x)
    with model.disable_adapter():
        off = model(x)
    assert_close(off, wanted, dtype)
    if not kind.native:
        assert torch.equal(off, wanted)
    assert torch.equal(model(x), on)
    if method.mergeable:
        model.merge_adapter()
    merged = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), off)
    assert torch.equal(model(x), merged)
    model.base_model.disable_adapter_layers()
    assert torch.equal(model(x), off)
    model.base_model.enable_adapter_layers()
    assert torch.equal(model(x), merged)
    model.unmerge_adapter()
    assert torch.equal(model(x), on)


@each_pair
def test_a_deleted_adapter_leaves_nothing_behind(method: MethodCase, kind: KindCase) -> None:
    model, x = adapted(method, kind), kind.inputs()
    before, wanted = snapshot(model), model(x)
    add(model, "other", method, kind)
    model.set_adapter("other")
    model.delete_adapter("other")
    model.set_adapter("default")
    assert_unchanged(before, model)
    assert torch.equal(model(x), wanted)
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    with pytest.raises(ValueError, match="other"):
        model.set_adapter("other")


@each_pair
def test_deleting_the_only_adapter_leaves_the_bare_model(method: MethodCase, kind: KindCase) -> None:
    bare = kind.build().requires_grad_(False)
    before, wanted = snapshot(bare), bare(kind.inputs())
    model = get_peft_model(bare, method.on(kind))
    model.delete_adapter("default")
    assert not model.active_adapters and not model.peft_config
    assert torch.equal(model(kind.inputs()), wanted)
    model.unload()
    assert_unchanged(before, bare)


@each_pair
def test_unloading_gives_the_base_back(method: MethodCase, kind: KindCase) -> None:
    bare = kind.build()
    for p in bare.parameters():
        p.requires_grad_(False)
    before = snapshot(bare)
    model = get_peft_model(bare, method.on(kind))
    if method.mergeable:
        model.merge_adapter()
    assert model.unload() is bare
    assert_unchanged(before, bare)


@each_pair
def test_copies_share_nothing(method: MethodCase, kind: KindCase) -> None:
    model, x = adapted(method, kind), kind.inputs()
    add(model, "other", method, kind)
    wanted = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied(x), wanted)
        assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
        copied.set_adapter("other")
        assert not torch.equal(copied(x), wanted)
        if method.mergeable:
            copied.merge_adapter()
        copied.base_model.disable_adapter_layers()
        assert model.active_adapters == ["default"]
        assert torch.equal(model(x), wanted)


@each_pair
def test_an_adapter_can_be_set_into_a_model_that_keeps_its_class(method: MethodCase, kind: KindCase) -> None:
    wrapped, bare, x = adapted(method, kind), kind.build(), kind.inputs()
    injected = inject_adapter_in_model(method.on(kind), bare)
    assert injected is bare
    state = get_peft_model_state_dict(wrapped)
    names = {key.removeprefix("base_model.model.") for key in state}
    assert set(get_peft_model_state_dict(injected)) == names
    injected.load_state_dict(
        {k.removeprefix("base_model.model."): v for k, v in wrapped.state_dict().items()}
    )
    assert torch.equal(injected(x), wrapped(x))


@each_pair
def test_models_on_the_meta_device_are_adapted_there(method: MethodCase, kind: KindCase) -> None:
    model = get_peft_model(kind.build().to("meta"), method.on(kind))
    assert all(p.is_meta for p in model.parameters())
    real = adapted(method, kind)
    assert [(n, p.shape) for n, p in model.named_parameters()] == [
        (n, p.shape) for n, p in real.named_parameters()
    ]


def test_adapters_of_other_names_go_to_folders_of_their_own(tmp_path: Path) -> None:
    method, kind = METHODS[0], KINDS[0]
    model = adapted(method, kind)
    add(model, "other", method, kind)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert [p.name for p in tmp_path.iterdir()] == ["other"]
    model.save_pretrained(tmp_path)
    assert (
        load_file(tmp_path / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "other" / "adapter_model.safetensors").keys()
    )
    with seeded(), pytest.raises(ValueError, match="third"):
        model.save_pretrained(tmp_path / "new", selected_adapters=["other", "third"])
    assert not (tmp_path / "new").exists()
