"""Bottleneck adapters: what they compute, on any module, under what programs put around them, and what they refuse."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bottleneck_models import inputs_for, model_named, shake
from inlay import (
    BottleneckConfig,
    Family,
    LoraConfig,
    PeftModel,
    PeftWarning,
    Points,
    freeze_delta,
    get_peft_model,
    get_peft_model_state_dict,
    register_family,
)
from inlay.layers.output import AdaptedOutput
from inlay.layers.taps import taps_on
from inlay.methods.bottleneck import families
from inlay.methods.bottleneck.block import Kronecker, part_of
from inlay.methods.bottleneck.presets import PRESETS
from tiny_models import output_of


def adapted(name: str, **changes: Any) -> PeftModel:
    return get_peft_model(model_named(name), BottleneckConfig(**({"reduction_factor": 4} | changes))).eval()


# ---------------------------------------------------------------------- the numbers of BERT-base


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("seq_bn", 894_528), ("pfeiffer", 894_528), ("double_seq_bn", 1_789_056), ("par_bn", 7_091_712), ("scaled_par_bn", 7_091_724),
        ("compacter", 57_088), ("compacterpp", 28_576), ("mindpet_adapter", 2_379_264), ("low_rank", 57_024),
    ],
)  # fmt: skip
def test_parameter_counts_are_those_of_adapterhub_and_mindpet(preset: str, count: int) -> None:
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = get_peft_model(BertModel(BertConfig()), BottleneckConfig.preset(preset))
    assert model.get_nb_trainable_parameters()[0] == count


# ---------------------------------------------------------------------- the formula, written down a second time


class Block(nn.Module):
    """A sub-layer without a transformer around it."""

    def __init__(self) -> None:
        super().__init__()
        self.work = nn.Linear(6, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.work(x))


def _on_work(**changes: Any) -> tuple[PeftModel, Tensor, dict[str, Tensor]]:
    model = get_peft_model(
        Block(), BottleneckConfig(target_modules=["work"], bottleneck_size=4, **changes)
    ).eval()
    shake(model)
    state = get_peft_model_state_dict(model)
    return (
        model,
        torch.randn(3, 5, 6),
        {k.removeprefix("base_model.model.work."): v for k, v in state.items()},
    )


def test_series_on_any_module() -> None:
    model, x, p = _on_work(non_linearity="gelu_new", scaling=3)
    y = model.base_model.model.work.base_layer(x)
    f = F.gelu(y @ p["adapter_down.weight"].T + p["adapter_down.bias"], approximate="tanh")
    f = f @ p["adapter_up.weight"].T + p["adapter_up.bias"]
    torch.testing.assert_close(model(x), model.base_model.model.head(y + 3 * f))


def test_parallel_on_any_module_reads_its_input() -> None:
    model, x, p = _on_work(parallel=True, non_linearity="tanh", ln_before=True, scaling="channel")
    y = model.base_model.model.work.base_layer(x)
    r = F.layer_norm(x, (6,), p["adapter_norm_before.weight"], p["adapter_norm_before.bias"])
    f = torch.tanh(r @ p["adapter_down.weight"].T + p["adapter_down.bias"])
    f = f @ p["adapter_up.weight"].T + p["adapter_up.bias"]
    torch.testing.assert_close(model(x), model.base_model.model.head(y + p["adapter_scaling"] * f))


def test_low_rank_and_gate() -> None:
    model, x, p = _on_work(low_rank=2, use_gating=True)
    y = model.base_model.model.work.base_layer(x)
    f = torch.relu(
        y @ (p["adapter_down.weight_left"] @ p["adapter_down.weight_right"]) + p["adapter_down.bias"]
    )
    f = f @ (p["adapter_up.weight_left"] @ p["adapter_up.weight_right"]) + p["adapter_up.bias"]
    gate = torch.sigmoid(y @ p["adapter_gate.weight"].T + p["adapter_gate.bias"]).mean(1, keepdim=True)
    torch.testing.assert_close(model(x), model.base_model.model.head(y + gate * f))


@pytest.mark.parametrize("rank", [1, 2, None])
def test_kronecker_is_a_sum_of_kronecker_products(rank: int | None) -> None:
    layer, rule, x = Kronecker(12, 8, 4, rank, True, {}), torch.randn(4, 4, 4), torch.randn(2, 3, 12)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    w = layer.W if rank is None else layer.W_left @ layer.W_right
    h = sum(torch.kron(a, b) for a, b in zip(rule, w, strict=True))
    for down in (True, False):
        part = part_of(layer, down, rule, layer, x)
        y = part.down(x) if down else part.up(x)
        torch.testing.assert_close(y, x @ h + layer.bias, rtol=1e-4, atol=1e-4)


def test_kronecker_takes_the_cheaper_way() -> None:
    assert Kronecker(768, 24, 4, 1, True, {}).through_factors
    assert not Kronecker(768, 24, 4, None, True, {}).through_factors
    assert not Kronecker(16, 4, 4, 4, True, {}).through_factors


@pytest.mark.parametrize(
    "changes",
    [
        *[{}, {"shared_phm_rule": False}, {"shared_W_phm": True}, {"learn_phm": False}],
        {"shared_W_phm": True, "factorized_phm_W": False, "phm_bias": False},
    ],
    ids=str,
)
def test_what_compacter_shares(changes: dict[str, Any], tmp_path: Path) -> None:
    config = BottleneckConfig.preset("compacter", reduction_factor=2, **changes)
    model = get_peft_model(model_named("bert"), config).eval()
    shake(model)
    inputs = inputs_for("bert")
    y = output_of(model, inputs)
    (y**3).sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    rules = [n for n in get_peft_model_state_dict(model) if n.endswith("rule")]
    assert len(rules) == (8 if changes.get("shared_phm_rule") is False else 1)
    assert sum("rule" in n for n in trained) == (0 if changes.get("learn_phm") is False else len(rules))
    factors = [n for n in trained if n.rsplit(".", 1)[-1] in ("W", "W_left")]
    assert len(factors) == (2 if changes.get("shared_W_phm") else 8)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model_named("bert"), tmp_path).eval()
    torch.testing.assert_close(output_of(again, inputs), y, rtol=0, atol=0)
    copied = copy.deepcopy(model)
    shake(model)
    torch.testing.assert_close(output_of(copied, inputs), y, rtol=0, atol=0)
    model.delete_adapter("default")
    assert not any("adapter_" in n for n in model.state_dict())


def test_how_factors_and_rules_are_drawn() -> None:
    def drawn(**changes: Any) -> tuple[Tensor, Tensor]:
        config = BottleneckConfig.preset(
            "compacter", target_modules=["0"], placement=None, bottleneck_size=64, **changes
        )
        model = get_peft_model(nn.Sequential(nn.Linear(256, 256)), config)
        layer = model.base_model.model[0]
        return layer.adapter_down["default"].W_left.detach(), layer.adapter_rule["default"].detach()

    bound = (6 / (64 + 1)) ** 0.5  # W_left[n, 256 / 4, 1]
    uniform, rule = drawn()
    assert 0.9 * bound < uniform.abs().max() <= bound and rule.std() < 2e-4
    normal, _ = drawn(hypercomplex_nonlinearity="glorot-normal")
    assert normal.abs().max() > bound
    small, rule = drawn(hypercomplex_nonlinearity="normal", phm_c_init="uniform", phm_init_range=0.5)
    assert small.std() < 0.02 and 0.4 < rule.abs().max() <= 0.5


def test_two_adapters_act_one_after_the_other() -> None:
    model, x, p = _on_work()
    model.add_adapter("b", BottleneckConfig(target_modules=["work"], bottleneck_size=2))
    model.set_adapter(["default", "b"])
    shake(model, seed=1)
    layer = model.base_model.model.work
    y = layer.base_layer(x)
    for name in ("default", "b"):
        down, up = layer.adapter_down[name], layer.adapter_up[name]
        y = y + up(torch.relu(down(y)))
    torch.testing.assert_close(model(x), model.base_model.model.head(y))
    assert p


def test_sizes_by_block_and_blocks_left_out() -> None:
    model = adapted("llama", reduction_factor={"0": 2, "default": 8}, leave_out=[1])
    sizes = {slot.path: slot["adapter_down"].out_features for slot in model.base_model.slots("default")}
    assert sizes == {
        f"model.layers.{i}.{end}": {0: 8, 2: 2}[i]
        for i in (0, 2)
        for end in ("self_attn.o_proj", "mlp.down_proj")
    }
    model = adapted("llama", bottleneck_size={2: 5, "default": 3}, placement="attention")
    assert [s["adapter_down"].out_features for s in model.base_model.slots("default")] == [3, 3, 5]


def test_outputs_that_are_tuples_and_mappings() -> None:
    class Attention(nn.Module):
        def __init__(self, wrap: Any) -> None:
            super().__init__()
            self.linear, self.wrap = nn.Linear(4, 4), wrap

        def forward(self, *, hidden: Tensor) -> Any:
            return self.wrap(self.linear(hidden))

    for wrap, first in (
        (lambda y: (y, "weights"), lambda out: out[0]),
        (lambda y: [y, "weights"], lambda out: out[0]),
        (lambda y: {"y": y, "w": "weights"}, lambda out: out["y"]),
    ):
        inner = Attention(wrap)
        model = get_peft_model(
            nn.ModuleDict({"attention": inner}), BottleneckConfig(target_modules=["attention"], parallel=True)
        )
        shake(model)
        layer, x = model.base_model.model["attention"], torch.randn(2, 4)
        out = layer(hidden=x)
        assert type(out) is type(wrap(x)) and (out["w"] if isinstance(out, dict) else out[1]) == "weights"
        change = layer.adapter_up["default"](torch.relu(layer.adapter_down["default"](x)))
        torch.testing.assert_close(first(out), inner.linear(x) + change)


def test_dropout_and_stochastic_depth_only_in_training() -> None:
    model, x, _ = _on_work(dropout=0.5, stochastic_depth=0.5)
    y = model(x)
    assert torch.equal(y, model(x))
    with torch.no_grad():
        base = model.get_base_model()
        plain = base.head(base.work.base_layer(x))
    model.train()
    seen = torch.stack([model(x).detach() for _ in range(40)])
    left_out = (seen == plain).all(-1).all(-1)
    assert 0.3 < left_out.float().mean() < 0.7
    model2, x, _ = _on_work(stochastic_depth=0.4)
    wanted = model2(x).detach()
    model2.train()
    mean = torch.stack([model2(x).detach() for _ in range(400)]).mean(0)
    assert (mean - wanted).abs().max() < 0.25 * wanted.abs().max()


# ---------------------------------------------------------------------- programs around it


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = adapted(name, original_ln_before=True)
        shake(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        (output_of(model, inputs_for(name), use_cache=False) ** 3).sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}

    wanted, got = gradients(False), gradients(True)
    assert wanted and got.keys() == wanted.keys()
    for key, grad in wanted.items():
        assert grad.norm() > 1e-3 and (got[key] - grad).norm() <= 1e-4 * grad.norm(), key


def test_a_recomputation_that_stops_early_leaves_nothing() -> None:
    """Without reentrance, checkpointing stops when it has what it needs, perhaps between two taps."""
    model = adapted("bert", original_ln_before=True, original_ln_after=False, residual_before_ln=False)
    shake(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    (output_of(model, inputs_for("bert")) ** 3).sum().backward()
    model.eval()
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(
            output_of(model, inputs_for("bert")), output_of(model_named("bert"), inputs_for("bert"))
        )


@pytest.mark.parametrize(
    "changes",
    [{}, {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False}],
    ids=str,
)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_copies_have_lives_of_their_own(name: str, changes: dict[str, Any]) -> None:
    model, inputs = adapted(name, **changes), inputs_for(name)
    shake(model)
    with torch.no_grad():
        y = output_of(model, inputs)
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        read = torch.load(file, weights_only=False)
        shake(model)
        for other in (copied, read):
            assert torch.equal(output_of(other, inputs), y)
            layers = {id(m) for m in other.modules() if isinstance(m, AdaptedOutput)}
            taps = [tap for m in other.modules() for tap in taps_on(m)]
            assert taps and {id(tap.layer) for tap in taps} == layers
            other.delete_adapter("default")
            assert not any(taps_on(m) for m in other.modules())


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["torch_last", pytest.param("torch_first", marks=pytest.mark.slow)])
def test_compiled_as_one_graph(name: str) -> None:
    changes = {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False}
    model, x = adapted(name, **changes), inputs_for(name)["x"]
    shake(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = model(x)["logits"]
    torch.testing.assert_close(compiled(x)["logits"], y)
    (y**3).sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (compiled(x)["logits"] ** 3).sum().backward()
    for key, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, wanted[key], rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(compiled(x)["logits"], model_named(name)(x)["logits"])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_language_model() -> None:
    model, inputs = adapted("llama", parallel=True), inputs_for("llama")
    shake(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(**inputs, use_cache=False).logits
    torch.testing.assert_close(y, output_of(model, inputs), rtol=1e-4, atol=1e-4)


def test_threads_do_not_see_each_others_residuals() -> None:
    model = adapted("gpt2", parallel=True)
    shake(model)
    rows = inputs_for("gpt2", 8)["input_ids"]
    with torch.no_grad():
        wanted = [output_of(model, {"input_ids": row[None]}) for row in rows]
    wrong: list[int] = []
    start = threading.Barrier(4)

    def serve(number: int) -> None:
        start.wait()
        for step in range(12):
            i = (number + step) % len(rows)
            with torch.no_grad():
                found = output_of(model, {"input_ids": rows[i][None]})
            if not torch.allclose(found, wanted[i], atol=1e-5):
                wrong.append(i)

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, {"original_ln_before": True, "ln_before": True, "ln_after": True, "use_gating": True}, {"phm_layer": True, "reduction_factor": 2}], ids=str)  # fmt: skip
def test_half_precision_bases(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    model = get_peft_model(
        model_named("llama").to(dtype), BottleneckConfig(**({"reduction_factor": 4} | changes))
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    output_of(model, inputs_for("llama")).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_no_work_while_off() -> None:
    model, inputs = adapted("gpt2"), inputs_for("gpt2")
    taps = [tap for m in model.modules() for tap in taps_on(m)]
    assert len(taps) == 4
    with torch.no_grad(), model.disable_adapter():
        output_of(model, inputs)
    assert all(tap.parked.value is None for tap in taps)
    with torch.no_grad():
        output_of(model, inputs)
    assert all(tap.parked.value is None for tap in taps)  # read, and forgotten


def test_biases_that_lora_trains_are_not_those_of_other_adapters() -> None:
    model = adapted("gpt2")
    model.add_adapter("lora", LoraConfig(target_modules=["c_attn"], bias="all"))
    model.set_adapter("lora")
    assert not any("adapter_" in n for n, p in model.named_parameters() if p.requires_grad)
    assert not any("adapter_" in key for key in get_peft_model_state_dict(model, adapter_name="lora"))


@pytest.mark.parametrize(
    ("preset", "mode"),
    [("mindpet_adapter", "adapter"), ("low_rank", "low_rank_adapter"), ("seq_bn", "Adapter")],
)
def test_mindpets_names_for_freezing(preset: str, mode: str) -> None:
    model = get_peft_model(model_named("bert"), BottleneckConfig.preset(preset, reduction_factor=4))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        p.requires_grad_(True)
    assert set(freeze_delta(model, mode).trainable) == trained


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_presets_and_where_they_start(name: str, preset: str) -> None:
    """AdapterHub's values are near the identity (Compacter: to the last bits); ``mam_adapter`` is it."""
    inputs, plain = inputs_for(name), output_of(model_named(name), inputs_for(name))
    for changes in ({}, {"init_weights": "mam_adapter"}):
        sizes = {} if preset == "mindpet_adapter" else {"reduction_factor": 4}
        config = BottleneckConfig.preset(preset, **sizes, **changes)
        model = get_peft_model(model_named(name), config).eval()
        distance = (output_of(model, inputs) - plain).abs().max() / plain.abs().max()
        assert (distance > 1e-6) == (
            config.init_weights != "mam_adapter" and preset not in ("compacter", "compacterpp")
        )
        assert distance < 0.3


# ---------------------------------------------------------------------- what is refused


def test_merging_is_refused_before_anything_is_changed() -> None:
    model = adapted("llama")
    model.add_adapter("lora", LoraConfig(target_modules=["down_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["lora", "default"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"not linear.*unload\(\).*save_pretrained"):
            verb()
    layer = next(m for m in model.modules() if isinstance(m, AdaptedOutput))
    for act in (lambda: layer.merge(), lambda: layer.get_delta_weight("default"), layer.base_matrix):
        with pytest.raises(ValueError):
            act()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())
    assert torch.equal(layer.weight, layer.get_base_layer().weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"placement": "feedforwrad"}, "feedforward"),
        ({"non_linearity": "gleu"}, "did you mean 'gelu'"),
        ({"reduction_factor": 0}, "reduction_factor=0"),
        ({"reduction_factor": {"first": 2}}, "numbers of blocks"),
        ({"bottleneck_size": -3}, "bottleneck_size=-3"),
        ({"bottleneck_size": 2.5}, "whole"),
        ({"scaling": "learnt"}, "scaling='learnt'"),
        ({"scaling": True}, "scaling=True"),
        ({"dropout": 1.0}, "below 1"),
        ({"phm_dim": 0, "phm_layer": True}, "phm_dim=0"),
        ({"low_rank": 0}, "low_rank=0"),
        ({"low_rank": 1, "phm_layer": True}, "choose one"),
        ({"init_weights": "zeros"}, "init_weights='zeros'"),
        ({"init_weights": "houlsby", "phm_layer": True}, "houlsby"),
        ({"residual_before_ln": "post_add"}, "original_ln_before=True"),
        ({"residual_before_ln": 1}, "residual_before_ln=1"),
        ({"parallel": True, "original_ln_before": True}, "parallel"),
        ({"adapter_residual_before_ln": True}, "ln_after=True"),
        ({"shared_W_phm": True}, "phm_layer=True"),
        ({"placement": "both", "target_modules": ["x"]}, "give one of them"),
        ({"target_modules": ["x"], "original_ln_after": False}, "use placement"),
        ({"leave_out": [-1]}, "leave_out"),
        ({"inv_adapter": "glow"}, "not implemented"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**fields)


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="did you mean 'houlsby'"):
        BottleneckConfig.preset("houlsbi")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gpt2", {"phm_layer": True, "phm_dim": 3}, "phm_dim=3 does not divide"),
        ("gpt2", {"leave_out": [7]}, "the model has 2"),
        ("gpt2", {"reduction_factor": {"0": 2}}, "no entry for block 1"),
        ("gpt2", {"target_modules": ["mlpp"]}, "mlp"),
        ("gpt2", {"target_modules": ["mlp.c_fc"], "original_ln_before": True}, "16 and 64 wide"),
        ("torch_last", {"target_modules": ["self_attn.out_proj"]}, "name the attention module"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_model(name: str, fields: dict[str, Any], message: str) -> None:
    base = model_named(name)
    before = [n for n, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, BottleneckConfig(**fields))
    assert [n for n, _ in base.named_modules()] == before and not any(taps_on(m) for m in base.modules())
    assert all(p.requires_grad for p in base.parameters())


def test_a_convolution_has_its_channels_elsewhere() -> None:
    with pytest.raises(ValueError, match="last axis"):
        get_peft_model(
            nn.Sequential(nn.Conv2d(3, 4, 1)), BottleneckConfig(target_modules=["0"], hidden_size=4)
        )


class Strange(nn.Module):
    """A transformer block under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_a, self.mix, self.norm_b, self.think = (
            nn.LayerNorm(4),
            nn.Linear(4, 4),
            nn.LayerNorm(4),
            nn.Linear(4, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm_a(x))
        return x + self.think(self.norm_b(x))


def test_unknown_blocks_and_how_to_make_them_known() -> None:
    base = nn.Sequential(Strange(), Strange())
    with pytest.raises(ValueError, match=r"target_modules.*register_family"):
        get_peft_model(base, BottleneckConfig())
    register_family(Family("strange", Points("norm_a", "mix"), Points("norm_b", "think")))
    try:
        model = get_peft_model(base, BottleneckConfig(bottleneck_size=2))
    finally:
        families.FAMILIES.pop(0)
    assert [s.path for s in model.base_model.slots("default")] == ["0.mix", "0.think", "1.mix", "1.think"]


def test_blocks_of_another_kind_beside_known_ones_are_named() -> None:
    base = model_named("gpt2")
    base.transformer.h.append(nn.Linear(16, 16))
    with pytest.warns(PeftWarning, match=r"transformer\.h\.2.*another structure"):
        get_peft_model(base, BottleneckConfig(reduction_factor=4))


def test_an_output_of_unknown_width() -> None:
    base = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    with pytest.raises(ValueError, match="hidden_size"):
        get_peft_model(base, BottleneckConfig(target_modules=["1"]))
    model = get_peft_model(base, BottleneckConfig(target_modules=["1"], hidden_size=6))
    assert model(torch.randn(2, 4)).shape == (2, 6)
    wrong = get_peft_model(model.unload(), BottleneckConfig(target_modules=["1"], hidden_size=5))
    with pytest.raises(ValueError, match="6 wide"):
        wrong(torch.randn(2, 4))
