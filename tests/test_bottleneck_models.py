"""Bottleneck adapters on the models of transformers and PyTorch: where they sit, what they read, and their life there."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bottleneck_models import MAIN, OTHERS, SEQ2SEQ, inputs_for, model_named, shake
from inlay import BottleneckConfig, LoraConfig, PeftModel, get_peft_model
from inlay.layers.output import AdaptedOutput
from inlay.layers.taps import taps_on
from inlay.method import Slot
from inlay.methods.bottleneck import Bottleneck
from tiny_models import output_of

PRESETS: list[dict[str, Any]] = [
    {},
    {"original_ln_before": True, "placement": "feedforward"},
    {"parallel": True, "scaling": 4},
    {"phm_layer": True, "reduction_factor": 2},
    {"low_rank": 2, "reduction_factor": 4, "init_weights": "lora"},
    {
        "original_ln_before": True,
        "original_ln_after": False,
        "residual_before_ln": False,
        "scaling": "channel",
    },
]
ADAPTERPLUS = PRESETS[-1]


def adapted(name: str, **changes: Any) -> PeftModel:
    return get_peft_model(model_named(name), BottleneckConfig(**({"reduction_factor": 4} | changes))).eval()


def clean(model: nn.Module) -> bool:
    return not any(taps_on(m) or isinstance(m, AdaptedOutput) for m in model.modules())


@pytest.mark.parametrize("name", MAIN + OTHERS)
def test_residual_output_and_norm_are_those_of_the_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model makes of the attention's y and r is the feed-forward block's r; what it makes of that one's, the next r."""
    model, seen = adapted(name), []

    def spy(self: Bottleneck, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        norm = slot.layer.norm()  # type: ignore[attr-defined]
        seen.append((slot.path, x, y + x if norm is None else norm(y + x)))
        return y

    monkeypatch.setattr(Bottleneck, "after", spy)
    with torch.no_grad():
        output_of(model, inputs_for(name))
    places = [path for path, wrapper in _slots(model)]
    if name != "albert":  # whose blocks share one set of weights
        assert sorted(path for path, _, _ in seen) == sorted(places)
        assert len(places) == (8 if name in SEQ2SEQ else 6 if name == "llama" else 4)
    joined = 0
    for (path, _, made), (after, residual, _) in itertools.pairwise(seen):
        if name in SEQ2SEQ and ("encoder" in path) != ("encoder" in after):
            continue  # the decoder starts from its own embeddings
        if name in SEQ2SEQ and "decoder" in path and _layer(path) == _layer(after):
            continue  # attention to the encoder comes in between
        torch.testing.assert_close(residual, made.reshape(residual.shape), rtol=1e-5, atol=1e-5)
        joined += 1
    assert joined >= (4 if name in SEQ2SEQ else 3)


def _slots(model: PeftModel) -> list[tuple[str, Slot]]:
    return [(slot.path, slot) for slot in model.base_model.slots("default")]


def _layer(path: str) -> str:
    return next(part for part in path.split(".") if part.isdigit())


@pytest.mark.parametrize("changes", PRESETS, ids=str)
@pytest.mark.parametrize("name", MAIN)
def test_life(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Identity at the start, disabled is the base, saved is reloaded, deleted and unloaded leave nothing behind."""
    inputs, base = inputs_for(name), model_named(name)
    with torch.no_grad():
        plain = output_of(base, inputs)
        model = adapted(name, **changes)
        torch.testing.assert_close(output_of(model, inputs), plain, rtol=1e-5, atol=1e-5)
        shake(model)
        trained = output_of(model, inputs)
        assert (trained - plain).abs().max() > 1e-3
        with model.disable_adapter():
            assert torch.equal(output_of(model, inputs), plain)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(model_named(name), tmp_path).eval()
        assert torch.equal(output_of(again, inputs), trained)
        low = PeftModel.from_pretrained(model_named(name), tmp_path, low_cpu_mem_usage=True).eval()
        assert torch.equal(output_of(low, inputs), trained)
        again.delete_adapter("default")
        assert torch.equal(output_of(again, inputs), plain) and clean(again)
        bare = model.unload()
        assert torch.equal(output_of(bare, inputs), plain) and clean(bare)
        assert [n for n, _ in bare.named_parameters()] == [n for n, _ in base.named_parameters()]


@pytest.mark.parametrize("name", ["bert", "gpt2", "torch_last", "torch_first"])
@pytest.mark.parametrize("changes", PRESETS, ids=str)
def test_each_sample_its_own_adapter(name: str, changes: dict[str, Any]) -> None:
    model = adapted(name, **changes)
    model.add_adapter("b", BottleneckConfig(reduction_factor=2, non_linearity="gelu"))
    for seed, adapter in enumerate(("default", "b")):
        model.set_adapter(adapter)
        shake(model, seed=seed)
    inputs = inputs_for(name, batch=4)
    names = ["b", "__base__", "default", "b"]
    with torch.no_grad():
        mixed = output_of(model, inputs, adapter_names=names)
        for row, adapter in enumerate(names):
            model.set_adapter("b" if adapter == "__base__" else adapter)
            alone = {key: value[row : row + 1] for key, value in inputs.items()}
            if adapter == "__base__":
                with model.disable_adapter():
                    wanted = output_of(model, alone)
            else:
                wanted = output_of(model, alone)
            torch.testing.assert_close(mixed[row : row + 1], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "t5", "bart", "mbart"])
@pytest.mark.parametrize("changes", PRESETS[:3], ids=str)
def test_generation_with_and_without_cache(name: str, changes: dict[str, Any]) -> None:
    model = adapted(name, **changes)
    shake(model)
    inputs = {"input_ids": inputs_for(name, 2)["input_ids"]}
    settings = {
        "max_new_tokens": 5,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    settings |= {"attention_mask": torch.ones_like(inputs["input_ids"])}
    cached, uncached = (model.generate(**inputs, **settings, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        plain = model.generate(**inputs, **settings, use_cache=True)
    assert (plain.logits[0] - cached.logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gemma2"])
def test_sdpa_is_eager_and_padding_does_not_matter(name: str) -> None:
    model = adapted(name, original_ln_before=True)
    shake(model)
    inputs = inputs_for(name)
    ids = inputs["input_ids"]
    padded = {
        "input_ids": torch.cat([ids, torch.zeros_like(ids[:, :2])], 1),
        "attention_mask": torch.tensor([[1] * 6 + [0] * 2] * 3),
    }
    with torch.no_grad():
        y = output_of(model, inputs)
        torch.testing.assert_close(output_of(model, padded)[:, :6], y, rtol=1e-4, atol=1e-4)
        model.get_base_model().set_attn_implementation("eager")
        torch.testing.assert_close(output_of(model, inputs), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "bert"])
def test_each_layer_uses_its_own_norm(name: str) -> None:
    """AdapterHub's plug-in models used the last layer's normalisation in all of them."""
    model = adapted(name, original_ln_before=True)
    calls: dict[str, int] = {}
    for path, module in model.named_modules():
        if "norm" in type(module).__name__.lower() and "layer" in path:
            module.register_forward_hook(lambda *_, path=path: calls.update({path: calls.get(path, 0) + 1}))
    with torch.no_grad():
        output_of(model, inputs_for(name))
    per_layer = (
        2 if name == "bert" else 1
    )  # Gemma 2 normalises y before the residual is added, inside the sub-layer
    assert set(calls.values()) == {per_layer}


@pytest.mark.parametrize("first", ["lora", "bottleneck"])
def test_beside_lora_on_the_same_linear_layer(first: str, tmp_path: Path) -> None:
    """The files do not tell which of the two came first."""
    lora = LoraConfig(target_modules=["down_proj", "o_proj"], r=2, init_lora_weights=False)
    configs = {"lora": lora, "bottleneck": BottleneckConfig(reduction_factor=4)}
    order = [first, *(configs.keys() - {first})]
    model = get_peft_model(model_named("llama"), configs[order[0]], adapter_name=order[0]).eval()
    model.add_adapter(order[1], configs[order[1]])
    inputs = inputs_for("llama")
    model.set_adapter(order)
    shake(model)
    with torch.no_grad():
        both = output_of(model, inputs)
        model.save_pretrained(tmp_path)
        alone = PeftModel.from_pretrained(model_named("llama"), tmp_path / "lora", adapter_name="lora").eval()
        model.set_adapter("lora")
        assert torch.equal(output_of(alone, inputs), output_of(model, inputs))
        alone.load_adapter(tmp_path / "bottleneck", adapter_name="bottleneck")
        alone.base_model.set_adapter(order[::-1])
        assert torch.equal(output_of(alone.eval(), inputs), both)
        layer = model.base_model.model.model.layers[0].mlp.down_proj
        assert isinstance(layer, AdaptedOutput) and list(layer.base_layer.slots) == ["lora"]
        model.merge_adapter(["lora"])
        model.set_adapter("bottleneck")
        torch.testing.assert_close(output_of(model, inputs), both, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        model.delete_adapter("bottleneck")
        assert clean(model)
        model.set_adapter("lora")
        model.delete_adapter("lora")
        assert torch.equal(output_of(model, inputs), output_of(model_named("llama"), inputs))


def test_norms_trained_beside_the_adapter(tmp_path: Path) -> None:
    """Houlsby et al. train the normalisations too: the adapter then uses the trained copies."""
    model = adapted("bert", original_ln_before=True, modules_to_save=["LayerNorm"])
    shake(model)
    inputs = inputs_for("bert")
    with torch.no_grad():
        trained = output_of(model, inputs)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(model_named("bert"), tmp_path).eval()
        assert torch.equal(output_of(again, inputs), trained)
        mixed = output_of(model, inputs, adapter_names=["default", "__base__", "default"])
        torch.testing.assert_close(mixed[::2], trained[::2], rtol=1e-4, atol=1e-4)
        plain = output_of(model_named("bert"), inputs)
        torch.testing.assert_close(mixed[1:2], plain[1:2], rtol=1e-4, atol=1e-4)
        model.delete_adapter("default")
        assert torch.equal(output_of(model, inputs), plain) and clean(model)


def test_on_the_output_of_a_norm_that_another_adapter_saves_whole() -> None:
    """In Gemma 2, a sub-layer ends in a normalisation."""
    ends, inputs = ["post_attention_layernorm"], inputs_for("gemma2")
    lora = LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=ends)
    model = get_peft_model(model_named("gemma2"), lora).eval()
    shake(model, 0.1)
    with torch.no_grad():
        saved, plain = output_of(model, inputs), output_of(model_named("gemma2"), inputs)
        model.add_adapter("b", BottleneckConfig(reduction_factor=4))
        assert torch.equal(output_of(model, inputs), saved)
        mixed = output_of(model, inputs, adapter_names=["default", "b", "default"])
        torch.testing.assert_close(mixed[::2], saved[::2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mixed[1], plain[1], rtol=1e-4, atol=1e-4)  # b is the identity yet
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(output_of(merged, inputs), saved, rtol=1e-4, atol=1e-4)
        assert clean(merged) and not any("modules_to_save" in n for n, _ in merged.named_modules())
        model.delete_adapter("default")
        assert torch.equal(output_of(model, inputs), plain)
        assert not any("modules_to_save" in n for n, _ in model.named_modules())
        with pytest.raises(ValueError, match="choose one of the two"):
            model.add_adapter("c", BottleneckConfig(reduction_factor=4, modules_to_save=ends))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_norm_that_takes_the_residual_may_be_replaced(name: str) -> None:
    norms = ["ln_1", "ln_2"] if name == "gpt2" else ["input_layernorm", "post_attention_layernorm"]
    model = adapted(name, parallel=True)
    model.add_adapter("b", BottleneckConfig(reduction_factor=4, parallel=True, modules_to_save=norms))
    inputs = inputs_for(name)
    with torch.no_grad():
        plain = output_of(model_named(name), inputs)
        model.set_adapter("b")
        shake(model)
        changed = output_of(model, inputs)
        model.set_adapter("default")
        assert torch.equal(output_of(model, inputs), plain)
        model.delete_adapter("default")
        model.set_adapter("b")
        assert torch.equal(output_of(model, inputs), changed)
        model.delete_adapter("b")
        assert torch.equal(output_of(model, inputs), plain) and clean(model)
