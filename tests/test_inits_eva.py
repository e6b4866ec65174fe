"""EVA: factors from what layers see, ranks by what they explain; and LoftQ's factors for a base that is there already."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay import (
    EvaConfig,
    LoraConfig,
    PeftModel,
    PeftWarning,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
    replace_lora_weights_loftq,
)
from inlay.inits.incremental_pca import IncrementalPCA
from inlay.inits.loftq import quantised
from tiny_models import VOCABULARY, output_of, tiny, tiny_inputs

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def batches(count: int = 3, labels: bool = False) -> list[dict[str, Tensor]]:
    """Return batches of token ids of which the last two positions are padding."""
    mask = torch.cat([torch.ones(8, 10), torch.zeros(8, 2)], 1).long()
    ids = [torch.randint(3, VOCABULARY, (8, 12)) for _ in range(count)]
    return [{"input_ids": i, "attention_mask": mask} | ({"labels": i.clone()} if labels else {}) for i in ids]


def eva_model(name: str = "llama", low_cpu_mem_usage: bool = False, **settings: Any) -> PeftModel:
    """Return a tiny model with an adapter that waits for EVA."""
    eva = EvaConfig(**{key: settings.pop(key) for key in list(settings) if hasattr(EvaConfig, key)})
    targets = settings.pop("target_modules", LINEAR)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights="eva", eva_config=eva, **settings
    )
    return get_peft_model(tiny(name), config, low_cpu_mem_usage=low_cpu_mem_usage)


def initialise(model: PeftModel, data: Any = None, **kwargs: Any) -> None:
    initialize_lora_eva_weights(model, data or batches(), show_progress_bar=False, **kwargs)


def ranks_of(model: PeftModel) -> dict[str, int]:
    """Return the rank of each adapted layer."""
    return {name: m.r["default"] for name, m in model.named_modules() if isinstance(m, inlay.AdaptedLayer)}


def test_components_of_rows_in_batches_are_those_of_all_rows() -> None:
    rows = torch.randn(90, 12) @ torch.diag(torch.linspace(3, 0.1, 12)) + 1
    pca = IncrementalPCA(12)
    for part in rows.split([5, 30, 7, 48]):
        pca.add(part)
    _, values, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    torch.testing.assert_close(pca.singular_values, values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        (pca.components * directions).sum(1).abs(), torch.ones(12), rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(pca.explained(), values.square() / (rows - rows.mean(0)).square().sum())


def test_first_factor_is_what_the_layer_sees() -> None:
    model = eva_model(rho=1.0, tau=0.999)
    data, seen = batches(), []
    initialise(model, data)
    hook = model.get_submodule(Q).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), model.disable_adapter():
        for batch in data:
            model(**batch)
    hook.remove()
    rows = torch.cat([x[:, :10].flatten(0, 1) for x in seen])
    rows = rows - rows.mean(0)
    a, best = model.get_submodule(Q).lora_A["default"].weight.detach(), torch.linalg.svd(rows)[2][:4]
    assert (rows @ a.T).norm() > 0.99 * (rows @ best.T).norm()
    torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha_by_r", "rslora"])
def test_ranks_are_redistributed_within_the_budget(use_rslora: bool, use_dora: bool, tmp_path: Any) -> None:
    model = eva_model(rho=2.0, use_rslora=use_rslora, use_dora=use_dora)
    inputs = tiny_inputs("llama")
    before, budget = output_of(model, inputs), sum(ranks_of(model).values())
    scale = model.get_submodule(Q).scaling["default"]
    initialise(model)
    ranks = ranks_of(model)
    assert sum(ranks.values()) == budget
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8
    torch.testing.assert_close(output_of(model, inputs), before)
    for name, module in model.named_modules():
        if isinstance(module, inlay.AdaptedLayer):
            assert module.scaling["default"] == pytest.approx(scale)
            assert module.lora_A["default"].weight.shape[0] == module.r["default"]
            assert all(p.requires_grad for p in module.slots["default"].parameters().values()), name
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert ranks_of(loaded) == ranks
    torch.testing.assert_close(output_of(loaded, inputs), output_of(model, inputs))


def test_a_layer_without_rank_loses_its_adapter() -> None:
    model = eva_model()
    components = get_eva_state_dict(model, batches(), show_progress_bar=False)
    components[Q] = components[Q][:0]
    initialize_lora_eva_weights(model, eva_state_dict=components)
    assert isinstance(model.get_submodule(Q), nn.Linear)
    assert len(ranks_of(model)) == len(components) - 1
    assert not any(Q in f"base_model.model.{name}" for name in model.peft_config["default"].target_modules)  # type: ignore[attr-defined]


def test_adapter_on_the_meta_device_is_made_real() -> None:
    model, usual = eva_model(low_cpu_mem_usage=True), eva_model()
    for m in (model, usual):
        torch.manual_seed(0)
        initialise(m)
    assert ranks_of(model) == ranks_of(usual)
    assert torch.equal(
        model.get_submodule(Q).lora_A["default"].weight, usual.get_submodule(Q).lora_A["default"].weight
    )


def test_a_bare_model_gives_the_same_components() -> None:
    data = batches()
    config = eva_model().peft_config["default"]
    adapted = get_eva_state_dict(eva_model(), data, show_progress_bar=False)
    bare = get_eva_state_dict(tiny("llama"), data, config, show_progress_bar=False)  # type: ignore[arg-type]
    assert {f"base_model.model.{path}" for path in bare} == adapted.keys()
    assert all(torch.equal(v, adapted[f"base_model.model.{path}"]) for path, v in bare.items())
    with_data, without = eva_model(), eva_model()
    initialize_lora_eva_weights(with_data, eva_state_dict=adapted)
    initialize_lora_eva_weights(without, eva_state_dict=bare)
    assert ranks_of(with_data) == ranks_of(without)


def test_gpt2_and_layers_that_see_no_rows_of_numbers() -> None:
    model = eva_model("gpt2", target_modules=["c_attn", "mlp.c_proj", "wpe"], rho=1.0)
    before = output_of(model, tiny_inputs("gpt2"))
    with pytest.warns(PeftWarning, match=r"EVA has no components for \['transformer.wpe'\]"):
        initialise(model)
    torch.testing.assert_close(output_of(model, tiny_inputs("gpt2")), before)
    assert model.get_base_model().training is False


def test_masked_labels_whitening_and_own_functions() -> None:
    data = batches(labels=True)
    model = eva_model(rho=1.0)
    plain = get_eva_state_dict(model, data, show_progress_bar=False)
    for batch in data:
        batch["labels"][:, :4] = -100
    masked = get_eva_state_dict(model, data, show_progress_bar=False)
    assert not torch.allclose(plain[Q], masked[Q])
    own = {path: lambda args, given, name: args[0][:, 4:10] for path in plain}
    chosen = get_eva_state_dict(
        model, data, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=own, show_progress_bar=False
    )
    assert torch.equal(chosen[Q], masked[Q])
    white = get_eva_state_dict(eva_model(rho=1.0, whiten=True), data, show_progress_bar=False)
    assert not torch.allclose(white[Q].norm(dim=1), torch.ones(4))
    torch.testing.assert_close(nn.functional.normalize(white[Q]), masked[Q])


def test_impossible_uses_are_refused() -> None:
    model, data = eva_model(), batches()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="dataloader is required if eva_state_dict is not provided"):
        initialize_lora_eva_weights(model)
    with pytest.raises(ValueError, match="dataloader is empty"):
        initialize_lora_eva_weights(model, [], show_progress_bar=False)
    with pytest.raises(ValueError, match="dataloader can be gone through only once"):
        initialise(model, (batch for batch in data))
    with pytest.raises(ValueError, match=r"prepare_layer_inputs_fn names \['nowhere'\]"):
        initialise(model, data, prepare_layer_inputs_fn={"nowhere": lambda args, given, name: args[0]})
    with pytest.raises(ValueError, match="eva_state_dict does not fit adapter 'default'"):
        initialize_lora_eva_weights(model, eva_state_dict={Q: torch.randn(4, 5)})
    with pytest.raises(ValueError, match="no row of the data reaches"):
        initialise(model, [batch | {"attention_mask": torch.zeros(8, 12)} for batch in data])
    with pytest.raises(ValueError, match="Adapter other not found"):
        initialise(model, data, adapter_name="other")
    with pytest.raises(ValueError, match="model must be a PeftModel, not a LlamaForCausalLM"):
        initialise(tiny("llama"), data)
    with pytest.raises(ValueError, match="peft_config is required"):
        get_eva_state_dict(tiny("llama"), data)
    plain = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match="can only be used with `init_lora_weights='eva'`; adapter 'default' has True"
    ):
        initialise(plain, data)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, inlay.AdaptedLayer))


@pytest.mark.filterwarnings("ignore")  # what PEFT warns of is not the subject
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_components_and_ranks_are_those_of_peft(rho: float) -> None:
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "init_lora_weights": "eva"}
    ours = get_peft_model(tiny("llama"), LoraConfig(**settings, eva_config=EvaConfig(rho=rho, tau=0.999)))
    config = peft.LoraConfig(**settings, eva_config=peft.EvaConfig(rho=rho, tau=0.999))
    theirs = peft.get_peft_model(tiny("llama"), config)
    data = batches(6)
    mine = get_eva_state_dict(ours, data, show_progress_bar=False)
    other = peft.get_eva_state_dict(theirs, data, show_progress_bar=False)
    assert mine.keys() == other.keys()
    differences = [abs(len(mine[path]) - len(other[path])) for path in mine]
    assert max(differences) <= 1
    assert sum(differences) <= 2
    for path, components in mine.items():
        both = min(len(components), len(other[path]), 3)
        assert ((components[:both] * other[path][:both]).sum(1).abs() > 0.97).all(), path
    components = {path: value.clone() for path, value in other.items()}
    initialize_lora_eva_weights(ours, eva_state_dict=components)
    peft.initialize_lora_eva_weights(theirs, eva_state_dict=dict(other))
    mine_config, their_config = ours.peft_config["default"], theirs.peft_config["default"]
    assert mine_config.rank_pattern == their_config.rank_pattern  # type: ignore[attr-defined]
    assert mine_config.alpha_pattern == their_config.alpha_pattern  # type: ignore[attr-defined]
    values = inlay.get_peft_model_state_dict(ours)
    for name, value in peft.get_peft_model_state_dict(theirs).items():
        assert torch.equal(values[name], value)


# ---------------------------------------------------------------------- LoftQ for a base that is there already


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_factors_make_up_for_a_quantised_base(use_dora: bool, tmp_path: Any) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    inputs = tiny_inputs("gpt2")
    wanted = output_of(tiny("gpt2"), inputs)
    base = tiny("gpt2")
    with torch.no_grad():
        for name, p in base.named_parameters():
            if "c_attn.weight" in name or "c_fc.weight" in name:
                p.copy_(quantised(p, 4))
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=4, target_modules=["c_attn", "c_fc"], use_dora=use_dora)
    ).eval()
    start = (output_of(model, inputs) - wanted).norm()
    seen: list[str] = []
    replace_lora_weights_loftq(model, tmp_path, callback=lambda m, path: seen.append(path) or False)  # type: ignore[func-returns-value]
    assert seen == [f"transformer.h.{i}.{name}" for i in range(2) for name in ("attn.c_attn", "mlp.c_fc")]
    assert (output_of(model, inputs) - wanted).norm() == start
    replace_lora_weights_loftq(model, tmp_path / "model.safetensors")
    assert (output_of(model, inputs) - wanted).norm() < 0.6 * start


def test_a_base_that_lost_nothing_is_refused(tmp_path: Any) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    model = get_peft_model(tiny("gpt2"), LoraConfig(r=4, target_modules=["c_attn"]))
    with pytest.raises(ValueError, match="no base weight under adapter 'default' differs from"):
        replace_lora_weights_loftq(model, tmp_path)
    with pytest.raises(ValueError, match="it is unknown where the base model was loaded from"):
        replace_lora_weights_loftq(
            get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
        )
