"""What is trained beside the adapted layers: saved modules, token rows, biases of the base, stacked blocks; and patterns of rank."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from inlay import AdaptedLayer, LoraConfig, PeftModel, PeftWarning, get_peft_model
from law_checks import assert_close, assert_unchanged, seeded, snapshot, train
from tiny_models import output_of, tiny, tiny_inputs

ROWS = tiny_inputs("llama")["input_ids"].unique()[:3].tolist()
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "tokens": ("llama", {"trainable_token_indices": ROWS}),
    "tokens_tied": ("llama_tied", {"trainable_token_indices": ROWS}),
    "tokens_and_dora": ("llama_tied", {"trainable_token_indices": ROWS, "use_dora": True}),
    "tokens_of_the_head": ("llama", {"trainable_token_indices": {"lm_head": ROWS}}),
    "saved_head": ("llama", {"modules_to_save": ["lm_head"]}),
    "saved_embedding": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "tokens_and_saved_head": ("llama", {"trainable_token_indices": ROWS, "modules_to_save": ["lm_head"]}),
    "saved_norm": ("llama", {"modules_to_save": ["norm"]}),
}


def trained(model: str, settings: dict[str, Any]) -> PeftModel:
    with seeded():
        adapted = get_peft_model(
            tiny(model), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **settings)
        ).eval()
    train(adapted, "default")
    return adapted


def by_the_book(
    model: str, adapted: PeftModel, inputs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits of the bare model with the weights that the parameters' names and values stand for, and those values."""
    exact = {
        k.removeprefix("base_model.model."): p.detach().double().requires_grad_()
        for k, p in adapted.named_parameters()
        if p.requires_grad
    }
    bare = tiny(model, torch.float64)
    weights: dict[str, Tensor] = {k: p.detach() for k, p in bare.named_parameters(remove_duplicate=False)}
    for name, value in exact.items():
        path, _, column = name.partition(".lora_A.default")
        if column:
            delta = 8 / 2 * exact[f"{path}.lora_B.default.weight"] @ value
            v = weights[f"{path}.weight"] + delta
            if (m := exact.get(f"{path}.lora_magnitude_vector.default.weight")) is not None:
                v = (m / v.detach().square().sum(1).sqrt())[:, None] * v
            weights[f"{path}.weight"] = v
        elif ".modules_to_save.default." in name:
            weights[name.replace(".modules_to_save.default", "")] = value
        elif ".token_adapter." in name:
            key = name.partition(".token_adapter")[0] + ".weight"
            tied = [
                k for k, p in bare.named_parameters(remove_duplicate=False) if p is bare.get_parameter(key)
            ]
            row = weights[key].index_copy(0, torch.tensor(ROWS), value)
            weights |= dict.fromkeys(tied, row)
    return functional_call(bare, weights, kwargs=inputs, tie_weights=False).logits, exact


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_with_extras_obeys_the_law(name: str, tmp_path: Path) -> None:
    base, settings = WHOLE[name]
    model, inputs = trained(base, settings), tiny_inputs(base)
    wanted, exact = by_the_book(base, model, inputs)
    wanted.square().sum().backward()
    got = output_of(model, inputs)
    assert_close(got, wanted, torch.float32)
    got.square().sum().backward()
    for key, p in model.named_parameters():
        if p.requires_grad:
            assert_close(p.grad, exact[key.removeprefix("base_model.model.")].grad, torch.float32, key)
    with model.disable_adapter():
        assert torch.equal(output_of(model, inputs), output_of(tiny(base), inputs))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(base), tmp_path)
    assert torch.equal(output_of(loaded, inputs), got)
    assert torch.equal(output_of(copy.deepcopy(model), inputs), got)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(output_of(merged, inputs), wanted, torch.float32)
    assert [p for p, _ in merged.named_modules()] == [p for p, _ in tiny(base).named_modules()]
    before = snapshot(model)
    model.merge_adapter()
    assert_close(output_of(model, inputs), wanted, torch.float32)
    model.unmerge_adapter()
    assert_unchanged(before, model)


@pytest.mark.parametrize("name", WHOLE)
def test_a_tied_weight_stays_tied(name: str) -> None:
    base, settings = WHOLE[name]
    model = trained(base, settings)
    for unloaded in (copy.deepcopy(model).unload(), copy.deepcopy(model).merge_and_unload()):
        assert (unloaded.lm_head.weight is unloaded.model.embed_tokens.weight) == (base == "llama_tied")


@pytest.mark.parametrize("name", WHOLE)
def test_extras_are_switched_routed_and_deleted_with_their_adapter(name: str) -> None:
    base, settings = WHOLE[name]
    inputs, model = tiny_inputs(base), trained(base, settings)
    before, alone = snapshot(model), output_of(model, inputs)
    with seeded():
        model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], **settings))
    train(model, "second")
    model.set_adapter("second")
    second = output_of(model, inputs)
    model.set_adapter("default")
    assert torch.equal(output_of(model, inputs), alone)
    with model.disable_adapter():
        bare = output_of(model, inputs)
    mixed = output_of(model, inputs, adapter_names=["second", "__base__", "default"])
    for row, expected in enumerate((second, bare, alone)):
        assert_close(mixed[row], expected[row], torch.float32)
    model.delete_adapter("second")
    assert_unchanged(before, model)


def test_the_head_of_a_classifier_is_trained_and_saved(tmp_path: Path) -> None:
    with seeded():
        model = get_peft_model(tiny("bert_classifier"), LoraConfig(task_type="SEQ_CLS"))
    assert {k for k, p in model.named_parameters() if p.requires_grad and "lora_" not in k} == {
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    }
    train(model, "default")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("bert_classifier"), tmp_path)
    assert type(loaded).__name__ == "PeftModelForSequenceClassification"
    inputs = tiny_inputs("bert")
    assert torch.equal(output_of(loaded, inputs), output_of(model.eval(), inputs))


@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_biases_of_the_base_are_trained_in_place_and_saved(mode: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny("bert"), LoraConfig(target_modules=["query"], bias=mode)).eval()
    names = {k for k, p in model.named_parameters() if p.requires_grad and "lora_" not in k}
    assert names == {
        k for k, _ in model.named_parameters() if k.endswith(".bias") and (mode == "all" or "query" in k)
    }
    with torch.no_grad():
        for key in names:
            model.get_parameter(key).normal_()
    with pytest.warns(PeftWarning, match="does not produce the same output"), model.disable_adapter():
        pass
    model.save_pretrained(tmp_path)
    inputs = tiny_inputs("bert")
    assert torch.equal(
        output_of(PeftModel.from_pretrained(tiny("bert"), tmp_path), inputs), output_of(model, inputs)
    )


def test_replicated_blocks_share_their_base_and_train_apart() -> None:
    with seeded():
        model = get_peft_model(
            tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 3)])
        )
    train(model, "default")
    layers = [block.self_attn.q_proj for block in model.base_model.model.model.layers]
    assert len(layers) == 4 == model.config.num_hidden_layers
    assert layers[1].base_layer.weight is layers[2].base_layer.weight
    assert not torch.equal(layers[1].lora_A["default"].weight, layers[2].lora_A["default"].weight)
    loss = output_of(model, tiny_inputs("llama"), use_cache=False).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="layer_replication"):
        model.merge_and_unload()


def test_rank_and_scale_by_pattern() -> None:
    patterns = {
        "rank_pattern": {"q_proj": 4, r"layers\.[12]\.self_attn\.v_proj": 2},
        "alpha_pattern": {"v_proj": 12},
    }
    model = get_peft_model(
        tiny("llama"), LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], lora_alpha=16, **patterns)
    )
    layers = {
        k.removeprefix("base_model.model.model."): m
        for k, m in model.named_modules()
        if isinstance(m, AdaptedLayer)
    }
    seen = {k: (m.r["default"], m.lora_alpha["default"], m.scaling["default"]) for k, m in layers.items()}
    for n in range(3):
        assert seen[f"layers.{n}.self_attn.q_proj"] == (4, 16, 4.0)
        assert seen[f"layers.{n}.self_attn.k_proj"] == (8, 16, 2.0)
        assert seen[f"layers.{n}.self_attn.v_proj"] == ((8, 12, 1.5) if n == 0 else (2, 12, 6.0))


def test_a_shared_module_is_adapted_once_and_stays_shared() -> None:
    shared = torch.nn.Linear(4, 4)
    base = torch.nn.ModuleDict({"first": shared, "second": shared})
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["first"]))
    assert base["first"] is base["second"] and isinstance(base["first"], AdaptedLayer)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (4 + 4)
    model.unload()
    assert base["first"] is base["second"] is shared


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("bert", {"target_modules": ["query"], "bias": "lora_only", "lora_bias": True}),
    ],
    ids=["embedding", "bias"],
)
def test_saving_while_merged_saves_the_base_as_it_is_unmerged(
    base: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with seeded():
        model = get_peft_model(tiny(base), LoraConfig(r=2, **settings)).eval()
    train(model, "default")
    wanted = output_of(model, tiny_inputs(base))
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(base), tmp_path)
    assert_close(output_of(loaded, tiny_inputs(base)), wanted, torch.float32)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_the_dtype_of_a_loaded_adapter(
    saved: torch.dtype, autocast_adapter_dtype: bool, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    """It is the base's, or float32 where half precision is to be avoided, whatever the file holds."""
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(tiny("llama", saved), settings, autocast_adapter_dtype=False).save_pretrained(tmp_path)
    how = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
    model = PeftModel.from_pretrained(tiny("llama", torch.bfloat16), tmp_path, **how)
    wanted = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {p.dtype for key, p in model.named_parameters() if "lora_" in key} == {wanted}
    assert output_of(model, tiny_inputs("llama")).dtype == torch.bfloat16
