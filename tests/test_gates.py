"""Gates (UniPELT): prefixes and LoRA multiplied by what a layer reads. AdapterHub's own numbers are in ``test_adapterhub.py``."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from inlay import BottleneckConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from inlay.blocks import open_gate
from prompt_models import BUILDERS
from tiny_models import tiny, tiny_inputs

MODELS = ["bert", "gpt2", "llama", "t5", "gptj"]  # the last one takes prefixes at its cache
each_model = pytest.mark.parametrize("name", MODELS)


def base(name: str, attention: str = "sdpa") -> Any:
    cls, config = BUILDERS[name][0], BUILDERS[name][1]()
    config._attn_implementation = attention if cls._supports_sdpa else "eager"
    torch.manual_seed(0)
    return cls(config).eval()


def prefix(**settings: Any) -> PrefixTuningConfig:
    return PrefixTuningConfig(num_virtual_tokens=3, **settings)


def inputs(name: str, rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(3, 40, (rows, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if name == "t5" else {})


def output(model: Any, given: dict[str, Tensor], **how: Any) -> Tensor:
    found: Tensor = model(**given, **how)[0]
    return found


def gates_of(model: PeftModel, adapter: str = "default") -> Any:
    return model.prompt_encoder[adapter].gates


def shaken(model: Any, seed: int = 2) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.5 * torch.randn(p.shape, generator=generator)
    return model


def test_a_gate_is_a_mean_over_positions() -> None:
    gate, x = nn.Linear(5, 2), torch.randn(3, 4, 5)
    wanted = torch.stack([torch.sigmoid(gate(row)).mean(0) for row in x])
    assert torch.allclose(open_gate(gate, x)[:, 0], wanted)
    assert torch.allclose(open_gate(gate, x[0]), torch.sigmoid(gate(x[0])))


@pytest.mark.parametrize(
    "name", ["bert", "gpt2", "llama", "gptj"]
)  # of T5's entries, two layers may use the same
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_constant_gate_scales_keys_and_values(name: str, attention: str) -> None:
    gated = shaken(get_peft_model(base(name, attention), prefix(use_gating=True, shared_gating=False)))
    plain = get_peft_model(base(name, attention), prefix())
    own = gated.prompt_encoder["default"].embedding.weight
    factors = torch.rand(len(gates_of(gated)), 2) / 2 + 0.2
    with torch.no_grad():
        for gate, open_ in zip(gates_of(gated), factors, strict=True):
            gate.weight.zero_()
            gate.bias.copy_(torch.logit(open_))
        width = own.shape[1] // factors.numel()
        plain.prompt_encoder["default"].embedding.weight.copy_(
            own * factors.flatten().repeat_interleave(width)
        )
        got, wanted = output(gated.eval(), inputs(name)), output(plain.eval(), inputs(name))
    assert torch.allclose(got, wanted, atol=1e-5)
    assert not torch.allclose(got, output(base(name, attention), inputs(name)), atol=1e-3)


@each_model
def test_each_sample_opens_its_own_gate_and_all_get_gradients(name: str) -> None:
    model = shaken(get_peft_model(base(name), prefix(use_gating=True))).train()
    given = inputs(name, rows=3)
    both = output(model, given)
    single = torch.cat([output(model, {k: v[i : i + 1] for k, v in given.items()}) for i in range(3)])
    assert torch.allclose(both, single, atol=1e-5)
    both.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in gates_of(model).parameters())


def test_gradient_checkpointing_finds_what_the_gate_reads() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = shaken(get_peft_model(base("llama"), prefix(use_gating=True))).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        output(model, inputs("llama")).square().sum().backward()
        gradients.append([p.grad.clone() for p in gates_of(model).parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("projection", [False, True])
def test_it_is_saved_and_loaded(projection: bool, tmp_path: Path) -> None:
    config = prefix(use_gating=True, shared_gating=False, prefix_projection=projection)
    model = shaken(get_peft_model(base("gpt2"), config)).eval()
    model.save_pretrained(tmp_path)
    keys = {f"prefix_gates.{i}.{part}" for i in range(3) for part in ("weight", "bias")}
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == keys | {"prompt_embeddings"}
    wanted = output(model, inputs("gpt2"))
    for trainable in (False, True):
        again = PeftModel.from_pretrained(base("gpt2"), tmp_path, is_trainable=trainable)
        assert torch.allclose(output(again, inputs("gpt2")), wanted, atol=1e-6)
    again.load_adapter(tmp_path, "other")
    again.set_adapter("other")
    assert torch.allclose(output(again, inputs("gpt2")), wanted, atol=1e-6)


def test_a_plain_prefix_pays_nothing_and_is_saved_as_ever(tmp_path: Path) -> None:
    model = get_peft_model(base("gpt2"), prefix())
    attention = model.get_base_model().transformer.h[0].attn
    assert not attention._forward_pre_hooks
    model.save_pretrained(tmp_path)
    assert (
        not {"use_gating", "shared_gating"}
        & json.loads((tmp_path / "adapter_config.json").read_text()).keys()
    )
    model.add_adapter("gated", prefix(use_gating=True))
    assert len(attention._forward_pre_hooks) == 1
    model.delete_adapter("gated")
    assert not attention._forward_pre_hooks and not attention._forward_pre_hooks_with_kwargs


def test_mixed_batches_and_several_at_once() -> None:
    model = get_peft_model(base("llama"), prefix(use_gating=True), "gated")
    model.add_adapter("plain", prefix(use_gating=False))
    model.add_adapter("longer", PrefixTuningConfig(num_virtual_tokens=5, use_gating=True))
    model.base_model.set_requires_grad(["gated", "plain", "longer"])
    shaken(model).eval()
    given, names = inputs("llama", rows=4), ["gated", "__base__", "longer", "plain"]
    mixed = output(model, given, adapter_names=names)
    for i, name in enumerate(names):
        row = {k: v[i : i + 1] for k, v in given.items()}
        if name == "__base__":
            with model.disable_adapter():
                alone = output(model, row)
        else:
            model.set_adapter(name)
            alone = output(model, row)
        assert torch.allclose(mixed[i : i + 1], alone, atol=1e-5), name
    model.set_adapter(["gated", "plain"])
    two = output(model, given)
    model.set_adapter(["plain", "gated"])
    assert torch.allclose(output(model, given), two, atol=1e-5)  # of keys, the order does not matter
    model.set_adapter("plain")
    assert not torch.allclose(output(model, given), two, atol=1e-3)


def test_it_can_be_copied_pickled_and_deleted() -> None:
    model = shaken(get_peft_model(base("gpt2"), prefix(use_gating=True))).eval()
    wanted = output(model, inputs("gpt2"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, inputs("gpt2")), wanted)
        with torch.no_grad():
            gates_of(twin)[0].bias.add_(3)
        assert not torch.equal(output(twin, inputs("gpt2")), wanted)
    assert torch.equal(output(model, inputs("gpt2")), wanted)
    bare = model.unload()
    assert torch.equal(output(bare, inputs("gpt2")), output(base("gpt2"), inputs("gpt2")))
    assert not bare.transformer.h[0].attn._forward_pre_hooks


def test_in_bfloat16_and_in_generation() -> None:
    model = shaken(get_peft_model(base("llama").to(torch.bfloat16), prefix(use_gating=True))).eval()
    assert output(model, inputs("llama")).dtype == torch.bfloat16
    assert model.generate(**inputs("llama"), max_new_tokens=3, do_sample=False).shape == (2, 9)


def test_a_gated_prefix_is_not_known_before_the_model_runs() -> None:
    model = get_peft_model(base("gpt2"), prefix(use_gating=True))
    with pytest.raises(ValueError, match="gated by what each layer reads"):
        model.get_prompt(2)


# ---------------------------------------------------------------------- LoRA


def lora_with_gate(**changes: Any) -> BottleneckConfig:
    return BottleneckConfig.preset(
        "gated_lora", bottleneck_size=2, target_modules=["query", "value"], **changes
    )


def test_a_gated_lora_starts_as_the_identity_and_computes_its_formula() -> None:
    model, given = get_peft_model(tiny("bert"), lora_with_gate()).eval(), tiny_inputs("bert")
    with model.disable_adapter():
        assert torch.equal(output(model, given), output(tiny("bert"), given))
    assert torch.equal(output(model, given), output(tiny("bert"), given))
    shaken(model)
    layer = model.get_base_model().encoder.layer[0].attention.self.query
    x = torch.randn(3, 5, layer.base_layer.in_features)
    a, b, gate = (getattr(layer, f"adapter_{part}")["default"] for part in ("down", "up", "gate"))
    g = torch.sigmoid(x @ gate.weight.T + gate.bias).mean(1, keepdim=True)
    low = x @ a.weight.T + a.bias
    wanted = layer.base_layer(x) + g * (low @ b.weight.T + b.bias)
    assert torch.allclose(layer(x), wanted, atol=1e-5)


def test_a_gated_lora_cannot_be_merged_and_is_saved(tmp_path: Path) -> None:
    model, given = shaken(get_peft_model(tiny("bert"), lora_with_gate())).eval(), tiny_inputs("bert")
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("bert"), tmp_path)
    assert torch.equal(output(again, given), output(model, given))


def test_unipelt_of_three_adapters_trains() -> None:
    model = get_peft_model(base("bert"), prefix(use_gating=True), "prefix")
    model.add_adapter("bottleneck", BottleneckConfig.preset("seq_bn", reduction_factor=4, use_gating=True))
    model.add_adapter("lora", lora_with_gate())
    model.set_adapter(["prefix", "bottleneck", "lora"])
    shaken(model).train()
    output(model, inputs("bert")).square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    assert sum("gate" in name for name in trained) == 3 * 2 * (1 + 1 + 2)


def test_plain_lora_has_no_gate() -> None:
    model = get_peft_model(tiny("bert"), LoraConfig(r=2, target_modules=["query"]))
    assert not any("gate" in name for name, _ in model.named_parameters())
