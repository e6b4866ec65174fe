"""Adapters under what a training or serving program puts around them: compilers, autocast, checkpointing, threads, generate."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from inlay import BottleneckConfig, LoraConfig, PeftModel, get_peft_model
from inlay.methods.bottleneck.block import Kronecker
from law_cases import KINDS, METHODS, ON_OUTPUTS, KindCase, MethodCase
from law_checks import assert_close, seeded, train
from law_reference import adapted, add
from tiny_models import output_of, tiny, tiny_inputs

BY_NAME = {method.name: method for method in METHODS}
COMPILED = [
    ("lora", "linear"), ("lora_bias", "linear"), ("dora", "linear"), ("lora", "gpt2_conv1d"), ("lora", "conv2d"), ("dora", "conv2d_groups"),
    ("lora", "embedding_padding"), ("dora", "embedding"), ("trainable_tokens", "embedding"), ("lora", "mha"), ("dora", "experts_two"),
    ("vera", "linear"),
]  # fmt: skip
QUICK = COMPILED[:3]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients(model: nn.Module, y: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (y.double() ** 3).sum().backward()  # a sum of squares does not see rotations
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model: PeftModel, compiled: Any, x: Tensor) -> None:
    wanted, got = model(x), compiled(x)
    assert_close(got, wanted, torch.float32)
    wanted_gradients = gradients(model, wanted)
    got_gradients = gradients(model, compiled(x))
    assert got_gradients.keys() == wanted_gradients.keys() and wanted_gradients
    for key, g in got_gradients.items():
        assert_close(g, wanted_gradients[key], torch.float32, f"gradient of {key}")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("method", "kind"),
    [pytest.param(*p, id="-".join(p), marks=[] if p in QUICK else pytest.mark.slow) for p in COMPILED],
)
def test_compiled_as_one_graph(method: str, kind: str) -> None:
    case, layer = BY_NAME[method], next(k for k in KINDS if k.name == kind)
    model, x = adapted(case, layer), layer.inputs()
    add(model, "other", case, layer)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_step(model, compiled, x)
    model.set_adapter("other")
    assert_same_step(model, compiled, x)
    with model.disable_adapter():
        assert_close(compiled(x), layer.build()(x), torch.float32)
    assert_same_step(model, compiled, x)
    model.set_adapter(["default", "other"])
    assert_same_step(model, compiled, x)
    model.merge_adapter()
    assert_close(compiled(x), model(x), torch.float32)
    model.unmerge_adapter()
    assert_same_step(model, compiled, x)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("settings", [{}, {"use_dora": True, "lora_dropout": 0.1}], ids=str)
def test_a_compiled_language_model_trains(settings: dict[str, Any]) -> None:
    with seeded():
        model = get_peft_model(
            tiny("llama"),
            LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **settings),
        )
    train(model, "default")
    inputs = tiny_inputs("llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(output_of(compiled, inputs), output_of(model, inputs), torch.float32)
    model.train()
    loss = compiled(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "name",
    ["linear", "linear_no_bias", "gpt2_conv1d", "conv2d", "conv2d_groups", "embedding", "mha", "experts"],
)
@pytest.mark.parametrize("method", METHODS + ON_OUTPUTS, ids=lambda method: method.name)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_autocast_casts_as_it_does_without_an_adapter(
    method: MethodCase, name: str, base: torch.dtype
) -> None:
    kind = next(k for k in KINDS if k.name == name)
    if not method.fits(kind):
        pytest.skip(f"{method.name} does not adapt {name}")
    model, x = adapted(method, kind, base), kind.inputs(base)
    exact = adapted(method, kind, torch.float64)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    wanted = exact(x.double() if x.is_floating_point() else x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bare, y = kind.build(base)(x), model(x)
    assert y.dtype == bare.dtype
    assert_close(y, wanted, torch.bfloat16)
    for (key, g), w in zip(gradients(model, y).items(), gradients(exact, wanted).values(), strict=True):
        assert g.dtype == model.get_parameter(key).dtype
        assert_close(g, w, torch.bfloat16, f"gradient of {key}")


def enable_checkpointing(base: Any, use_reentrant: bool) -> None:
    """Call what transformers has for it; version 5 warns at the old name."""
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("before", [True, False], ids=["enabled_before", "enabled_after"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_dropout": 0.3}], ids=str)
def test_gradient_checkpointing_changes_nothing(
    use_reentrant: bool, before: bool, settings: dict[str, Any]
) -> None:
    inputs = tiny_inputs("llama")
    found = []
    for checkpointing in (False, True):
        base = tiny("llama")
        if checkpointing and before:
            enable_checkpointing(base, use_reentrant)
        with seeded():
            model = get_peft_model(
                base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
            ).train()
        if checkpointing and not before:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
            )
        train(model, "default")
        with seeded():
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    assert len(found[0]) == 2 * 7 * 3 * (1.5 if settings == {"use_dora": True} else 1)
    for key, g in found[0].items():
        assert_close(found[1][key], g, torch.float32, f"gradient of {key}")


@pytest.mark.parametrize(
    "kind", [KINDS[0], next(k for k in KINDS if k.name == "conv2d")], ids=lambda kind: kind.name
)
@pytest.mark.parametrize("method", METHODS[:4], ids=lambda method: method.name)
def test_threads_do_not_see_each_other(method: MethodCase, kind: KindCase) -> None:
    model, x = adapted(method, kind), kind.inputs()
    add(model, "other", method, kind)
    wanted: dict[str, Tensor] = {"base": kind.build()(x)}
    for name in ("other", "default"):
        model.set_adapter(name)
        wanted[name] = model(x).detach()
    mixed = torch.cat([wanted["other"][:2], wanted["base"][2:3], wanted["default"][3:]])
    faults: list[str] = []
    start = threading.Barrier(6)

    def disabled() -> None:
        with model.disable_adapter():
            check("base", model(x))

    def check(name: str, y: Tensor, want: Tensor | None = None) -> None:
        if float((y - (wanted[name] if want is None else want)).abs().max()) > 1e-5:
            faults.append(name)

    jobs = [
        disabled,
        lambda: check("default", model(x)),
        lambda: check("default", model(x, adapter_names=["default"] * len(x))),
        lambda: check("other", model(x, adapter_names=["other"] * len(x))),
        lambda: check("base", model(x, adapter_names=["__base__"] * len(x))),
        lambda: check("mixed", model(x, adapter_names=["other", "other", "__base__", "default"]), mixed),
    ]

    def work(job: Any) -> None:
        start.wait()
        with torch.inference_mode():
            for _ in range(60):
                job()

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"trainable_token_indices": [5, 7]}], ids=str)
def test_generating_a_mixed_batch_is_generating_one_by_one(name: str, settings: dict[str, Any]) -> None:
    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    config = LoraConfig(r=2, task_type=task, **settings)
    with seeded():
        model = get_peft_model(tiny(name), config)
        model.add_adapter("other", config)
    for adapter in ("default", "other"):
        train(model, adapter)
    ids = tiny_inputs(name)["input_ids"]
    route = ["other", "__base__", "default"]
    for arguments in ({"num_beams": 1}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        fixed = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6, **arguments}
        got = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=route, **fixed)
        rows = []
        for sample, adapter in zip(ids.split(1), route, strict=True):
            mask = torch.ones_like(sample)
            if adapter == "__base__":
                with model.disable_adapter():
                    rows.append(model.generate(input_ids=sample, attention_mask=mask, **fixed))
            else:
                model.set_adapter(adapter)
                rows.append(model.generate(input_ids=sample, attention_mask=mask, **fixed))
        assert torch.equal(got, torch.cat(rows))
        assert name == "t5" or len({tuple(row.tolist()) for row in got}) > 1


def test_a_mixed_batch_cannot_be_checkpointed_in_training() -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(**tiny_inputs("llama"), adapter_names=["default"] * 3)


class Doubling(nn.Linear):
    """A linear layer that does more than its product."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
def test_hooks_of_the_base_layer_still_run(settings: dict[str, Any]) -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    base[0].register_forward_hook(lambda module, args, y: y + 1.0)
    wanted = base(torch.ones(2, 4))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], **settings))
    assert_close(model(torch.ones(2, 4)), wanted, torch.float32)


def test_a_layer_with_a_forward_of_its_own_keeps_it() -> None:
    base = nn.Sequential(Doubling(4, 4))
    wanted = base(torch.ones(2, 4))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    assert_close(model(torch.ones(2, 4)), wanted, torch.float32)
    model.merge_adapter()
    assert_close(model(torch.ones(2, 4)), wanted, torch.float32)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
def test_values_changed_in_place_are_seen_at_once(settings: dict[str, Any]) -> None:
    """What DoRA keeps between eval calls must not outlive the values it was made from."""
    with seeded():
        model = get_peft_model(
            nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"], **settings)
        ).eval()
    x = torch.ones(2, 4)
    layer: Any = model.base_model.model[0]

    def check() -> None:
        with torch.no_grad():
            got = model(x)
            model.merge_adapter()
            assert_close(got, model(x), torch.float32)
            model.unmerge_adapter()

    check()
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    check()
    layer.lora_B["default"].weight.data = torch.randn(4, 2)
    check()
    with torch.no_grad():
        layer.base_layer.weight.mul_(3.0)
    check()
    model.load_state_dict({key: value * 1.5 for key, value in model.state_dict().items()})
    check()
    layer.set_scale("default", 3.0)
    check()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    check()
    model.to(torch.float64).to(torch.float32)
    check()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_runs_on_the_meta_device(method: MethodCase) -> None:
    kind = next(k for k in KINDS if k.name == ("layer_norm" if method.name == "ln_tuning" else "linear"))
    model, x = adapted(method, kind), kind.inputs()
    wanted = model(x)
    model.to("meta")
    y = model(x.to("meta"))
    assert (y.device.type, y.shape) == ("meta", wanted.shape)
    add(model, "other", method, kind)  # is made where the model is now
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_gradients_and_changed_values_after_inference_mode(method: MethodCase) -> None:
    """What is kept between evaluations, such as DoRA's norm, serves training too, and no longer than its values hold."""
    kind = next(k for k in KINDS if k.name == ("layer_norm" if method.name == "ln_tuning" else "linear"))
    model, fresh, x = adapted(method, kind), adapted(method, kind), kind.inputs()
    with torch.inference_mode():
        assert_close(model(x), fresh(x.clone()), torch.float32)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(fresh(x).square().sum(), [p for p in fresh.parameters() if p.requires_grad])
    for got, want in zip(torch.autograd.grad(model(x).square().sum(), parameters), wanted, strict=True):
        assert_close(got, want, torch.float32)
    with torch.no_grad():
        for m in (model, fresh):
            for p in (p for p in m.parameters() if p.requires_grad):
                p.mul_(1.25)
        before, fresh = model(x), fresh.train().eval()
        assert_close(before, fresh(x), torch.float32)


def test_what_is_kept_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Compacter forms its narrow matrices anew in training only."""
    formed: list[str] = []
    part = Kronecker.down

    def counted(self: Kronecker, *args: Any) -> Any:
        formed.append("down")
        return part(self, *args)

    monkeypatch.setattr(Kronecker, "down", counted)
    config = BottleneckConfig.preset(
        "compacter", phm_dim=2, reduction_factor=2, placement=None, target_modules=["0"]
    )
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).eval()
    x = torch.ones(2, 8)
    with torch.no_grad():
        for _ in range(3):
            model(x)
        assert len(formed) == 1
        model.base_model.model[0].adapter_rule["default"].mul_(2.0)
        model(x)
        assert len(formed) == 2
    model(x).sum().backward()
    model(x)
    assert len(formed) == 4


def dense_compacter() -> Any:
    config = BottleneckConfig.preset(
        "compacter",
        phm_dim=2,
        reduction_factor=2,
        placement=None,
        target_modules=["0"],
        factorized_phm_W=False,
    )
    with seeded():
        model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).eval()
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p.copy_(torch.randn_like(p))
    return model


def test_what_is_kept_is_not_rounded_by_autocast() -> None:
    model, x = dense_compacter(), torch.linspace(-1, 1, 16).view(2, 8)
    with torch.no_grad():
        want = dense_compacter()(x)
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        assert torch.equal(model(x), want)


def test_nothing_is_kept_of_a_run_without_values() -> None:
    model, x = dense_compacter(), torch.linspace(-1, 1, 16).view(2, 8)
    with torch.no_grad():
        want = dense_compacter()(x)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(x))
        assert torch.equal(model(x), want)
