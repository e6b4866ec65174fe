"""What happens to an adapter in its life, for every method on every kind of layer: merged and unmerged, saved and loaded,
disabled, deleted, copied, pickled whole."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from law_cases import (
    KINDS,
    METHODS,
    PAIR_IDS,
    PAIRS,
    KindCase,
    MethodCase,
    adapted,
    add,
    assert_close,
    assert_unchanged,
    seeded,
    snapshot,
    twin,
)
from safetensors.torch import load_file

from inlay import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model

each_pair = pytest.mark.parametrize(("method", "kind"), PAIRS, ids=PAIR_IDS)
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
IN_ALL_DTYPES = {"linear", "gpt2_conv1d", "conv2d_groups", "embedding", "mha", "experts"}
MERGED = [
    (method, kind, dtype)
    for method, kind in PAIRS
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype == torch.bfloat16 or kind.name in IN_ALL_DTYPES
]


@pytest.mark.parametrize(("method", "kind", "dtype"), MERGED, ids=lambda v: getattr(v, "name", str(v).removeprefix("torch.")))
def test_unmerging_restores_the_base_bit_for_bit(method: MethodCase, kind: KindCase, dtype: torch.dtype) -> None:
    model = adapted(method, kind, dtype)
    add(model, "other", method, kind)
    before = snapshot(model)
    for first, second in [(("default",), ()), (("default",), ("other",)), (("other", "default"), ("default",)), (("other",), ("default", "other"))]:
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
    merged = twin(model).merge_and_unload()
    assert_close(merged(x), wanted, torch.float32)
    assert_close(twin(model).merge_and_unload(safe_merge=True)(x), wanted, torch.float32)
    assert [(path, type(m)) for path, m in merged.named_modules()] == [(path, type(m)) for path, m in bare.named_modules()]
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
    assert {k: (i, f) for k, (i, _, f) in now["tensors"].items()} == {k: (i, f) for k, (i, _, f) in before["tensors"].items()}  # type: ignore[attr-defined]
    assert all(torch.equal(v, now["tensors"][k][1]) for k, (_, v, _) in before["tensors"].items())  # type: ignore[attr-defined]


@each_pair
def test_a_saved_adapter_is_the_same_when_it_is_loaded(method: MethodCase, kind: KindCase, tmp_path: Path) -> None:
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
def test_unloading_gives_the_base_back(method: MethodCase, kind: KindCase) -> None:
    bare = kind.build()
    for p in bare.parameters():
        p.requires_grad_(False)
    before = snapshot(bare)
    model = get_peft_model(bare, method.on(kind))
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
    for copied in (twin(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied(x), wanted)
        assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
        copied.set_adapter("other")
        assert not torch.equal(copied(x), wanted)
        copied.merge_adapter()
        copied.base_model.disable_adapter_layers()
        assert model.active_adapters == ["default"]
        assert torch.equal(model(x), wanted)


@each_pair
def test_a_merged_model_can_be_copied_and_unmerged(method: MethodCase, kind: KindCase) -> None:
    model = adapted(method, kind)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    model.merge_adapter()
    copied = twin(model)
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


@each_pair
def test_an_adapter_can_be_set_into_a_model_that_keeps_its_class(method: MethodCase, kind: KindCase) -> None:
    wrapped, bare, x = adapted(method, kind), kind.build(), kind.inputs()
    injected = inject_adapter_in_model(method.on(kind), bare)
    assert injected is bare
    state = get_peft_model_state_dict(wrapped)
    names = {key.removeprefix("base_model.model.") for key in state}
    assert set(get_peft_model_state_dict(injected)) == names
    injected.load_state_dict({k.removeprefix("base_model.model."): v for k, v in wrapped.state_dict().items()})
    assert torch.equal(injected(x), wrapped(x))


@each_method
def test_models_on_the_meta_device_are_adapted_there(method: MethodCase) -> None:
    for kind in KINDS:
        if method.applies(kind):
            with torch.device("meta"):
                bare = kind.build().to("meta")
            model = get_peft_model(bare, method.on(kind))
            assert all(p.is_meta for p in model.parameters())
            real = adapted(method, kind)
            assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in real.named_parameters()]


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    """Also in another process, where Python orders its sets otherwise, and however often it is saved."""
    save_all(tmp_path / "here")
    save_all(tmp_path / "again")
    script = "import sys, pathlib, test_law_life; test_law_life.save_all(pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "there")], check=True, env=environment)
    files = {path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*") if path.is_file()}
    assert len(files) >= 2 * len(METHODS)
    for other in ("again", "there"):
        assert {path.relative_to(tmp_path / other) for path in (tmp_path / other).rglob("*") if path.is_file()} == files
        for file in files:
            assert (tmp_path / other / file).read_bytes() == (tmp_path / "here" / file).read_bytes(), file


def save_all(folder: Path) -> None:
    """Save an adapter of each method that names its layers by a set of many names."""
    kind = next(kind for kind in KINDS if kind.name == "encoder_layer_linear")
    names = ["layer.linear1", "linear1", "layer.linear2", "linear2"]
    for method in METHODS:
        with seeded():
            model = get_peft_model(kind.build(), method.config(target_modules=names))
        model.save_pretrained(folder / method.name)


def test_adapters_of_other_names_go_to_folders_of_their_own(tmp_path: Path) -> None:
    method, kind = METHODS[0], KINDS[0]
    model = adapted(method, kind)
    add(model, "other", method, kind)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert [p.name for p in tmp_path.iterdir()] == ["other"]
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == load_file(tmp_path / "other" / "adapter_model.safetensors").keys()
    with seeded(), pytest.raises(ValueError, match="third"):
        model.save_pretrained(tmp_path / "new", selected_adapters=["other", "third"])
    assert not (tmp_path / "new").exists()
