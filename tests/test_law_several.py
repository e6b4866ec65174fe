"""Several adapters at once, for every method on every kind of layer: stacked, switched, and one for each sample of a batch."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch import Tensor, nn

from inlay import LoraConfig, PeftModel, get_peft_model
from inlay.composition.rows import groups_of
from law_cases import KINDS, METHODS, PAIR_IDS, PAIRS, SCALE_ONLY, KindCase, MethodCase
from law_checks import assert_close
from law_models import BATCH, Attending
from law_reference import adapted, add, exact_copy, parameters_of, reference

each_pair = pytest.mark.parametrize(("method", "kind"), PAIRS, ids=PAIR_IDS)
STACKS = [
    (first, second, kind)
    for first, second in itertools.product(METHODS, METHODS)
    for kind in KINDS
    if first.fits(kind) and second.fits(kind)
]
# Every pair of methods meets on a few kinds; on the others, each method meets itself and LoRA, which says as much.
STACKS = [
    (first, second, kind)
    for first, second, kind in STACKS
    if kind.name in ("linear", "conv2d_groups", "embedding", "layer_norm")
    or (
        (first is second or "lora" in (first.name, second.name))
        and not SCALE_ONLY & {first.name, second.name}
    )
]
# AdaLoRA keeps parameters where LoRA keeps modules, as PEFT does; both on one layer are refused (test_adalora).
STACKS = [
    (first, second, kind)
    for first, second, kind in STACKS
    if "adalora" not in (first.name, second.name)
    or kind.name.startswith("embedding")
    or not {first.name, second.name} & {"lora", "rslora", "lora_bias", "dora"}
]
ROUTE = ["second", "__base__", "default", "second"]


def names_of(value: object) -> str:
    return value.name if isinstance(value, (MethodCase, KindCase)) else str(value)


def two(
    first: MethodCase, second: MethodCase, kind: KindCase, dtype: torch.dtype = torch.float64
) -> PeftModel:
    model = adapted(first, kind, dtype)
    add(model, "second", second, kind)
    return model


@pytest.mark.parametrize(("first", "second", "kind"), STACKS, ids=names_of)
def test_a_stack_is_its_adapters_merged_in_order(
    first: MethodCase, second: MethodCase, kind: KindCase
) -> None:
    x, model = kind.inputs(torch.float64), two(first, second, kind)
    x.requires_grad_(x.is_floating_point())
    by_name = {"default": first, "second": second}
    outputs = []
    for order in (("default", "second"), ("second", "default")):
        model.set_adapter(order)
        model.zero_grad()
        mine = {name: [parameters_of(model, spot, name) for spot in kind.spots] for name in order}
        exact = {name: [exact_copy(p) for p in mine[name]] for name in order}
        wanted = reference(kind, [(by_name[name], exact[name]) for name in order], x.detach(), torch.float64)
        got = model(x)
        assert_close(got, wanted, torch.float64)
        (got**3).sum().backward()  # a sum of squares does not see rotations
        (wanted**3).sum().backward()
        for name, index in itertools.product(order, range(len(kind.spots))):
            for key, p in mine[name][index].items():
                assert_close(p.grad, exact[name][index][key].grad, torch.float64, f"gradient of {name} {key}")
        outputs.append(got)
    if first.additive and second.additive:
        assert_close(outputs[0], outputs[1], torch.float64)


@each_pair
def test_switching_is_exact(method: MethodCase, kind: KindCase) -> None:
    model, x = two(method, method, kind, torch.float32), kind.inputs()
    outputs = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        outputs[name] = model(x)
        trained = {
            key.split(".")[-1 if key.endswith(name) else -2]
            for key, p in model.named_parameters()
            if p.requires_grad
        }
        assert trained == {name}
    assert not torch.equal(*outputs.values())
    model.set_adapter("default")
    assert torch.equal(model(x), outputs["default"])
    model.set_adapter("second", inference_mode=True)
    assert_close(model(x), outputs["second"], torch.float32)
    assert kind.native or torch.equal(model(x), outputs["second"])
    assert not any(p.requires_grad for p in model.parameters())


def by_hand(model: PeftModel, x: Tensor) -> Tensor:
    """Run each sample alone, through its own adapter."""
    parts = []
    for row, name in zip(x.split(1), ROUTE, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                parts.append(model(row))
        else:
            model.set_adapter(name)
            parts.append(model(row))
    return torch.cat(parts)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("method", "kind"), [p for p in PAIRS if p[1].sub_batches], ids=lambda v: v.name)
def test_a_mixed_batch_is_its_samples_one_by_one(method: MethodCase, kind: KindCase, training: bool) -> None:
    model, x = two(method, method, kind).train(training), kind.inputs(torch.float64)
    assert len(x) == len(ROUTE) == BATCH
    wanted = by_hand(model, x)
    model.base_model.set_requires_grad(["default", "second"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    got = model(x, adapter_names=ROUTE)
    assert_close(got, wanted, torch.float64)
    loss = (model(x, adapter_names=ROUTE) * torch.arange(1.0, got.numel() + 1).reshape(got.shape)).sum()
    gradients = torch.autograd.grad(loss, parameters)
    for name in ("default", "second"):
        rows = [i for i, n in enumerate(ROUTE) if n == name]
        model.set_adapter(name)
        model.base_model.set_requires_grad(["default", "second"])
        alone = (model(x[rows]) * torch.arange(1.0, got.numel() + 1).reshape(got.shape)[rows]).sum()
        for p, g, w in zip(
            parameters, gradients, torch.autograd.grad(alone, parameters, allow_unused=True), strict=True
        ):
            if w is not None:
                assert_close(g, w, torch.float64, f"gradient of a parameter of shape {tuple(p.shape)}")
    assert torch.equal(model(x, adapter_names=["__base__"] * BATCH), kind.build(torch.float64)(x))


@pytest.mark.parametrize(("method", "kind"), [p for p in PAIRS if not p[1].sub_batches], ids=lambda v: v.name)
def test_a_mixed_batch_is_right_or_refused_in_one_line(method: MethodCase, kind: KindCase) -> None:
    model, x = two(method, method, kind), kind.inputs(torch.float64)
    before, wanted = model(x), by_hand(model, x)
    model.set_adapter("default")
    try:
        got = model(x, adapter_names=ROUTE)
    except ValueError as error:
        assert "adapter_names" in str(error) and "\n" not in str(error)
    else:
        assert_close(got, wanted, torch.float64)
    assert torch.equal(model(x), before)


def test_a_mixed_batch_never_ignores_a_layer_that_is_only_read() -> None:
    """``nn.MultiheadAttention`` reads the weight of its output projection and never calls it."""
    torch.manual_seed(0)
    model = get_peft_model(
        Attending(nn.MultiheadAttention(8, 2, batch_first=True)),
        LoraConfig(r=2, target_modules=["out_proj"], init_lora_weights=False),
    )
    model.add_adapter("second", LoraConfig(r=2, target_modules=["out_proj"], init_lora_weights=False))
    model.eval()
    x = torch.randn(BATCH, 3, 8)
    wanted = by_hand(model, x)
    try:
        got = model(x, adapter_names=ROUTE)
    except ValueError as error:
        assert "adapter_names" in str(error)
    else:
        assert_close(got, wanted, torch.float32)


def test_mixed_batches_that_cannot_be_are_refused() -> None:
    method, kind = METHODS[0], KINDS[0]
    model, x = two(method, method, kind, torch.float32), kind.inputs()
    with pytest.raises(ValueError, match="got 2 and 4"):
        model(x, adapter_names=["default", "second"])
    with pytest.raises(ValueError, match=r"non-existing adapter.*: third"):
        model(x, adapter_names=["default", "second", "third", "default"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(x, adapter_names=ROUTE)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x, adapter_names=ROUTE), kind.build()(x))


def test_adapters_on_different_layers_act_together() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model = get_peft_model(base, LoraConfig(target_modules=["0", "1"], init_lora_weights=False), "first")
    model.add_adapter("second", LoraConfig(target_modules=["1", "2"], init_lora_weights=False, use_dora=True))
    model.set_adapter(["first", "second"])
    assert model.active_adapters == ["first", "second"]
    x = torch.randn(3, 6)
    wanted = model(x)
    model.merge_adapter()
    assert [layer.merged_adapters for layer in model.base_model.layers()] == [
        ["first"],
        ["first", "second"],
        ["second"],
    ]
    assert_close(model(x), wanted, torch.float32)
    model.unmerge_adapter()
    model.delete_adapter("first")
    assert model.active_adapters == ["second"]
    assert type(model.get_base_model()[0]) is nn.Linear
    assert [key for key, p in model.named_parameters() if p.requires_grad] == [
        f"base_model.model.{n}.{column}.second.weight"
        for n in (1, 2)
        for column in ("lora_A", "lora_B", "lora_magnitude_vector")
    ]


def test_switching_costs_the_same_for_any_number_of_layers_and_adapters() -> None:
    base = nn.Sequential(*[nn.Linear(4, 4) for _ in range(40)])
    model = get_peft_model(base, LoraConfig(r=1, target_modules=[str(n) for n in range(40)]))
    for n in range(24):
        model.add_adapter(f"a{n}", LoraConfig(r=1, target_modules=[str(n) for n in range(40)]))
    start = time.perf_counter()
    for _ in range(100):
        model.base_model.switch.change(active=("a3",))
        model.base_model.switch.change(active=("a5",))
    assert (time.perf_counter() - start) / 200 < 1e-3


@pytest.mark.parametrize(("name", "products"), [("lora", 1), ("bitfit", 1), ("dora", 3)])
def test_adapters_that_only_add_share_one_base_product_in_a_mixed_batch(name: str, products: int) -> None:
    method, kind = next(m for m in METHODS if m.name == name), KINDS[0]
    model, x = two(method, method, kind), kind.inputs(torch.float64)
    ran: list[int] = []
    for layer in model.base_model.layers():
        layer.get_base_layer().register_forward_hook(lambda _, inputs, output: ran.append(len(inputs[0])))
    model(x, adapter_names=ROUTE)
    assert ran.count(BATCH) == len(ran) if products == 1 else BATCH not in ran
    assert len(ran) == products * len(list(model.base_model.layers()))


def test_a_compiled_model_runs_mixed_batches() -> None:
    method, kind = METHODS[0], KINDS[0]
    model, x = two(method, method, kind, torch.float32).eval(), kind.inputs()
    wanted = model(x, adapter_names=ROUTE)
    model.get_base_model().compile(fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_close(model(x, adapter_names=ROUTE), wanted, torch.float32)


@pytest.mark.parametrize("rows", [3, 6, 12])
def test_rows_of_a_sample_lie_together(rows: int) -> None:
    """What is remembered of a mixed batch is as long as the batch, not as all its tokens, which routers see in one axis."""
    groups = groups_of(["b", "a", "b"], {"a", "b"}, rows, "a layer")
    x = torch.arange(4.0 * rows).view(rows, 4)
    gains = torch.tensor([10.0, 1.0, 10.0]).repeat_interleave(rows // 3)[:, None]
    assert torch.equal(groups.run(lambda name, own: own * (1.0 if name == "a" else 10.0), x), gains * x)
    assert groups.order == (1, 0, 2)
