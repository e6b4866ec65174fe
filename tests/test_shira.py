"""SHiRA: values that live in the base weight, and how the base comes back. The law is in ``test_law*``."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from inlay import (
    AdaptedLayer,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from inlay.kernels.sparse_values import sampled_product
from shira_models import IDS, TARGETS, adapted, bases, disturb, layers, net, shira
from small_net import Net

# ---------------------------------------------------------------------- values in the weight


def test_the_values_stand_in_the_weight_and_nothing_else_is_made() -> None:
    model = adapted()
    before, addresses = bases(model), [layer.get_base_layer().weight.data_ptr() for layer in layers(model)]
    model(IDS)
    for layer, base, address in zip(layers(model), before, addresses, strict=True):
        weight, (rows, columns) = layer.get_base_layer().weight, layer.shira_indices["default"].long()
        assert weight.data_ptr() == address
        changed = torch.zeros_like(base, dtype=torch.bool)
        changed[rows, columns] = True
        assert torch.equal(weight[changed], base[changed] + layer.shira_weight["default"].detach())
        assert torch.equal(weight[~changed], base[~changed])
        assert torch.equal(layer.base_matrix(), base)


def test_training_keeps_the_inputs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), shira(r=2, target_modules=["0", "1"])
    )
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(3, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert sum(kept.values()) == 2 * x.nbytes  # the input of each layer, and no weight
    y.sum().backward()
    assert {tuple(p.grad.shape) for p in model.parameters() if p.grad is not None} == {(256,)}


def test_only_steps_of_the_optimizer_write_to_the_weight() -> None:
    model = adapted()
    model(IDS)
    versions = [layer.get_base_layer().weight._version for layer in layers(model)]
    for _ in range(2):
        model(IDS).sum().backward()
    assert [layer.get_base_layer().weight._version for layer in layers(model)] == versions
    disturb(model)
    model(IDS)
    assert all(
        layer.get_base_layer().weight._version > old
        for layer, old in zip(layers(model), versions, strict=True)
    )


def test_an_optimizer_that_writes_past_autograd_is_seen_after_backward() -> None:
    model, twin = adapted(), adapted()
    for m in (model, twin):
        m(IDS).sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if p.requires_grad:
            p.data.sub_(p.grad)  # no version number changes
            with torch.no_grad():
                q -= q.grad
    assert torch.equal(model(IDS), twin(IDS))


def test_training_equals_training_of_the_merged_path(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: dict[bool, list[float]] = {}
    for merged in (False, True):
        if merged:
            monkeypatch.setattr(AdaptedLayer, "_run", AdaptedLayer._run_merged)
        model = adapted("a").double().train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses[merged] = []
        for _ in range(5):
            loss = model(IDS).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[merged].append(loss.item())
    assert losses[False] == pytest.approx(losses[True], rel=1e-10)
    assert losses[False][-1] < losses[False][0]


@pytest.mark.parametrize("n", [1, 255, 256, 700])
def test_sampled_products_are_entries_of_the_dense_one(n: int) -> None:
    dy, x = torch.randn(n, 300, dtype=torch.float64), torch.randn(n, 400, dtype=torch.float64)
    for k in (50, 20000):  # few entries are sampled, many are taken from pieces of the dense product
        places = torch.randperm(300 * 400)[:k]
        indices = torch.stack([places // 400, places % 400]).int()
        wanted = (dy.T @ x).flatten()[places]
        torch.testing.assert_close(sampled_product(dy, x, indices), wanted)


def test_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), shira(target_modules=["0"])).double()
    layer, x = layers(model)[0], torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    values = layer.shira_weight["default"]
    with torch.no_grad():
        values.normal_()

    def penalty(y: Tensor) -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
        found: tuple[Tensor, ...] = torch.autograd.grad(dx.square().sum(), (x, values))
        return found

    fast = penalty(model(x))
    exact = penalty(layer._run_merged([layer.slots["default"]], x))
    for a, b in zip(fast, exact, strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------- the base comes back, bit for bit


def test_the_base_is_restored_after_any_order_of_switches_and_merges() -> None:
    model = adapted("a", "b", "c", r=2)
    original, order = bases(net_as_model()), torch.Generator().manual_seed(0)
    expected = {names: copy.deepcopy(model) for names in (("a",), ("b",), ("a", "b"), ("c", "a", "b"))}
    for names, other in expected.items():
        other.set_adapter(list(names))
        other.merge_adapter()
    stacks = list(expected)
    for _ in range(40):
        names = stacks[int(torch.randint(len(stacks), (), generator=order))]
        model.set_adapter(list(names))
        assert torch.allclose(model(IDS), expected[names](IDS), atol=1e-5)
        action = int(torch.randint(5, (), generator=order))
        if action == 0:
            model.merge_adapter()
            model.unmerge_adapter()
        elif action == 1:
            model.disable_adapter_layers()
            assert torch.equal(model(IDS), net()(IDS))
            assert all(torch.equal(a, b) for a, b in zip(bases(model), original, strict=True))
            model.enable_adapter_layers()
        elif action == 2:
            with model.disable_adapter():
                assert torch.equal(model(IDS), net()(IDS))
        elif action == 3:
            state = {k: v for k, v in model.state_dict().items() if "base_layer.weight" in k}
            assert all(torch.equal(a, b) for a, b in zip(state.values(), original, strict=True))
    bare = model.unload()
    assert all(torch.equal(v, bare.state_dict()[k]) for k, v in net().state_dict().items())


def net_as_model() -> PeftModel:
    return get_peft_model(net(), LoraConfig(target_modules=TARGETS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whoever_reads_the_base_sees_the_base(dtype: torch.dtype) -> None:
    model = get_peft_model(net().to(dtype), shira())
    disturb(model)
    expected = {k: v.to(dtype) for k, v in net().state_dict().items()}
    y = model(IDS)

    def base_of(m: PeftModel) -> dict[str, Tensor]:
        bare = copy.copy(m.state_dict())
        return {
            k.removeprefix("base_model.model.").replace(".base_layer", ""): v
            for k, v in bare.items()
            if "shira" not in k
        }

    for reader in (
        base_of,
        lambda m: base_of(copy.deepcopy(m)),
        lambda m: base_of(pickle.loads(pickle.dumps(m))),
        lambda m: m.unload().state_dict(),
    ):
        assert torch.equal(model(IDS), y)  # the values are in the weight again
        found = reader(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_a_model_is_cast_and_moved_without_its_values() -> None:
    model = adapted()
    model(IDS)
    doubled = model.double()
    exact = adapted().double()
    assert torch.equal(doubled(IDS), exact(IDS))
    assert torch.equal(bases(exact)[0], bases(doubled)[0])
    exact.unload()
    assert torch.equal(doubled.unload().blocks[0]["q_proj"].weight, net().blocks[0]["q_proj"].weight.double())


def test_a_state_is_loaded_under_the_values() -> None:
    model, other = adapted(), adapted()
    model(IDS)
    state = {k: v.clone() + (0.5 if "base_layer" in k else 0.0) for k, v in other.state_dict().items()}
    model.load_state_dict(state)
    other.load_state_dict(state, assign=True)
    wanted = copy.deepcopy(other)
    wanted.merge_adapter()
    assert torch.allclose(model(IDS), wanted(IDS), atol=1e-6)
    assert torch.equal(model(IDS), other(IDS))
    assert all(layer.inside.entered for layer in layers(other))  # also in a parameter that was assigned


def test_a_deleted_adapter_leaves_nothing() -> None:
    model = adapted("a", "b")
    model(IDS)
    model.delete_adapter("a")
    assert not any("shira" in k and ".a" in k for k in model.state_dict())
    alone = adapted("a", "b")
    alone.set_adapter("b")
    assert torch.equal(model(IDS), alone(IDS))
    model.delete_adapter("b")
    assert torch.equal(model(IDS), net()(IDS))


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload(safe: bool) -> None:
    model = adapted("a", "b")
    model.set_adapter(["a", "b"])
    y = model(IDS)
    only_b = copy.deepcopy(model)
    bare = model.merge_and_unload(progressbar=False, safe_merge=safe)
    assert type(bare) is Net and torch.allclose(bare(IDS), y, atol=1e-6)
    only_b.set_adapter("b")
    wanted = only_b(IDS)
    only_b.set_adapter("a")
    only_b(IDS)
    assert torch.allclose(only_b.merge_and_unload(adapter_names=["b"])(IDS), wanted, atol=1e-6)


def test_a_merge_that_is_not_finite_is_refused() -> None:
    model = adapted()
    model(IDS)
    with torch.no_grad():
        layers(model)[1].shira_weight["default"][0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(model.unload()(IDS), net()(IDS))
