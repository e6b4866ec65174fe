"""AdaLoRA: the ranks and files of PEFT, and what happens to layers and optimizers when ranks go."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

import inlay
from inlay import AdaLoraConfig, AdapterFileError, LoraConfig, PeftModel, PeftWarning, get_peft_model
from inlay.files.folder import STATE_NAME
from inlay.kernels.orthogonality import orthogonality
from inlay.training.optimizer_state import hindrance
from law_cases import KINDS


class Net(nn.Module):
    """Linear layers of two shapes and a convolution; the loss is an attribute of the output, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 6), nn.Conv2d(2, 3, 2), nn.Linear(6, 8)])

    def forward(self, x: Tensor) -> Any:
        y = self.layers[1](torch.tanh(self.layers[0](x)))
        picture = self.layers[2](y.view(-1, 2, 1, 3).expand(-1, 2, 2, 3))
        loss = picture.square().mean() + (self.layers[3](y) - 1).square().mean()
        return CausalLMOutput(loss=loss, logits=y)


def settings(**changes: Any) -> dict[str, Any]:
    plan = {"init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 2, "total_step": 12, "lora_alpha": 6}
    return {"target_modules": ["0", "1", "2", "3"], "orth_reg_weight": 0.1} | plan | changes


def adapted(library: Any = inlay, **changes: Any) -> Any:
    torch.manual_seed(0)
    base = Net()
    torch.manual_seed(1)
    return library.get_peft_model(base, library.AdaLoraConfig(**settings(**changes)))


def pair(**changes: Any) -> tuple[Any, Any]:
    mine, theirs = adapted(inlay, **changes), adapted(peft, **changes)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def inputs(step: int) -> Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(step))


def trained(model: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=0.02)


pytestmark = [  # PEFT's, about files of its own making
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.* invalid shape"),
]

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": adamw,
    "adamw_fused": lambda ps: torch.optim.AdamW(ps, lr=0.02, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.5, momentum=0.9),
}


def run(model: Any, optimizer: Any, steps: range, allocate: bool = True) -> list[float]:
    losses = []
    for step in steps:
        loss = model(inputs(step)).loss
        loss.backward()
        optimizer.step()
        if allocate:
            model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def finished(**changes: Any) -> Any:
    model = adapted(**changes)
    run(model, adamw(trained(model).values()), range(14))
    return model


def ranks(model: Any) -> dict[str, int]:
    return inlay.rank_report(model)


def pattern(model: Any) -> dict[str, list[bool]]:
    found: dict[str, list[bool]] = model.peft_config["default"].rank_pattern
    return {key.replace(".default", ""): kept for key, kept in found.items()}


def part(value: Tensor, name: str, kept: dict[str, list[bool]]) -> Tensor:
    """Return what is kept of a parameter or gradient of PEFT, which never shrinks."""
    path, _, column = name.removeprefix("base_model.model.").removesuffix(".default").rpartition(".")
    keep = torch.tensor(kept[f"{path}.lora_E"])
    return value[:, keep] if column == "lora_B" else value[keep]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "plan",
    [{}, {"deltaT": 3, "total_step": 16}, {"tfinal": 0}, {"tinit": 0, "beta1": 0.5, "target_r": 2}],
    ids=str,
)
def test_every_step_is_that_of_peft_on_the_same_gradients(plan: dict[str, Any], optimizer: str) -> None:
    mine, theirs = pair(**plan)
    ours, wanted = (
        OPTIMIZERS[optimizer](trained(mine).values()),
        OPTIMIZERS[optimizer](trained(theirs).values()),
    )
    config, seen = mine.peft_config["default"], set()
    for step in range(config.total_step + 3):
        theirs(inputs(step)).loss.backward()
        mine(inputs(step)).loss.backward()
        small = config.rank_pattern is not None
        for name, p in trained(theirs).items():
            trained(mine)[name].grad = part(p.grad, name, config.rank_pattern) if small else p.grad.clone()
        for model, stepped in ((mine, ours), (theirs, wanted)):
            stepped.step()
            model.base_model.update_and_allocate(step)
            stepped.zero_grad()
        for name, p in trained(theirs).items():
            got = trained(mine)[name]
            wanted_values = part(p, name, config.rank_pattern) if config.rank_pattern is not None else p
            # The fused step's last bits depend on where a number lies in its tensor.
            assert torch.allclose(got, wanted_values, rtol=1e-5 * (optimizer == "adamw_fused"), atol=0), (
                f"{name} at step {step}"
            )
        seen.add(sum(ranks(mine).values()))
    assert pattern(mine) == pattern(theirs)
    assert sum(ranks(mine).values()) == 4 * config.target_r and len(seen) > 3
    assert sorted(p.shape[0] for n, p in trained(mine).items() if "lora_E" in n) == sorted(
        ranks(mine).values()
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_penalty_is_that_of_peft_and_only_in_training(training: bool) -> None:
    mine, theirs = (model.train(training) for model in pair())
    expected = theirs.base_model(inputs(0)).loss  # its PeftModel without a task forgets the penalty
    with mine.disable_adapter():
        plain = mine(inputs(0)).loss
    loss = mine(inputs(0)).loss
    if training:
        assert torch.allclose(loss, expected)
        assert torch.allclose(loss - plain, mine.penalty()) and mine.penalty() > 0.01
        loss.backward()
        expected.backward()
        for name, p in trained(theirs).items():
            assert torch.allclose(trained(mine)[name].grad, p.grad, atol=1e-6), name
    else:
        assert torch.equal(loss, plain)  # PEFT adds the penalty here as well
        assert torch.allclose(expected - plain, mine.penalty())


def test_without_a_penalty_or_for_other_methods_it_is_zero() -> None:
    assert adapted(orth_reg_weight=0).penalty() == 0.0
    model = get_peft_model(Net(), LoraConfig(target_modules=["0"]))
    assert model.penalty() == 0.0
    with pytest.raises(ValueError, match="leave the call out"):
        model.update_and_allocate(0)


def test_a_missing_gradient_is_explained() -> None:
    model = adapted()
    model(inputs(0)).loss.backward()
    model.zero_grad()
    with pytest.raises(
        ValueError, match=r"after loss.backward\(\) and optimizer.step\(\) and before zero_grad\(\)"
    ):
        model.update_and_allocate(0)
    with pytest.raises(ValueError, match=r"no importance of layers\.0 has been measured"):
        model.update_and_allocate(10)
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(ValueError, match="leave the call out"):
        model.update_and_allocate(0)


def test_a_step_that_overflowed_is_not_remembered() -> None:
    model = adapted()
    for step in range(11):
        model(inputs(step)).loss.backward()
        if step == 3:
            for p in trained(model).values():
                p.grad.fill_(torch.inf)
        else:
            with torch.no_grad():
                for p in trained(model).values():
                    p -= 0.05 * p.grad
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PeftWarning)  # no optimizer is known
            model.update_and_allocate(step)
        model.zero_grad()
    assert sum(ranks(model).values()) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_step": None}, "needs total_step"),
        ({"total_step": -1}, "it is -1"),
        ({"tinit": 8, "tfinal": 4}, "tinit=8 and tfinal=4 leave none of the total_step=12"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight=-0.1"),
        ({"beta2": 1.0}, "beta2=1.0"),
        ({"deltaT": 0}, "deltaT=0"),
        ({"init_r": 0}, "init_r=0"),
        ({"use_dora": True}, "use_dora=True has no meaning"),
        ({"use_rslora": True}, "use_rslora=True has no meaning"),
        ({"lora_bias": True}, "lora_bias=True has no meaning"),
        ({"alpha_pattern": {"0": 2}}, "alpha_pattern=.* has no meaning"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config=.* has no meaning"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian' has no meaning"),
        ({"rank_pattern": {"0": 3}}, "choose ranks with init_r and target_r"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaLoraConfig(**settings(**changes))


def test_what_is_not_used_is_told() -> None:
    with pytest.warns(PeftWarning, match="r=16 is not used"):
        AdaLoraConfig(total_step=9, r=16)
    with pytest.warns(PeftWarning, match="no rank will be pruned"):
        AdaLoraConfig(total_step=9, init_r=4)


def test_lora_and_adalora_do_not_share_a_layer() -> None:
    model = adapted()
    with pytest.raises(ValueError, match=r"cannot share layer layers\.0"):
        model.add_adapter("lora", LoraConfig(target_modules=["0"]))
    assert set(model.peft_config) == {"default"}


def test_equal_ranks_stay() -> None:
    model = finished(init_r=3, target_r=3)
    assert set(ranks(model).values()) == {3}
    assert all(all(kept) for kept in pattern(model).values())


@pytest.mark.parametrize("total", [72, 144, 288, 576])
def test_budgets_of_the_paper_are_average_ranks(total: int) -> None:
    """Six matrices in each of twelve layers, as in DeBERTa; half as many ranks again in the beginning."""
    names = {"query", "key", "value", "output.dense", "intermediate.dense"}
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 12, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = tf.BertForMaskedLM(tf.BertConfig(vocab_size=20, max_position_embeddings=8, **sizes))
    target = total // 72
    config = AdaLoraConfig(
        target_modules=names, init_r=-(-3 * target // 2), target_r=target, total_step=8, tfinal=2
    )
    model = get_peft_model(base, config)
    optimizer, ids = adamw(trained(model).values()), torch.arange(20)[None, :8]
    assert len(ranks(model)) == 72
    for step in range(8):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
    assert sum(ranks(model).values()) == total
    assert len(set(ranks(model).values())) > 1


# ---------------------------------------------------------------------- taking ranks out


def test_pruned_ranks_are_gone_from_layers_and_optimizers() -> None:
    model = adapted()
    optimizer = adamw(trained(model).values())
    before = sum(p.numel() for p in trained(model).values())
    run(model, optimizer, range(11))
    assert 0 in ranks(model).values()
    now = {name: p.shape for name, p in trained(model).items()}
    for path, rank in ranks(model).items():
        names = [f"base_model.model.{path}.lora_{part}.default" for part in "AEB"]
        assert [now[names[0]][0], now[names[1]][0], now[names[2]][1]] == [rank] * 3
    assert sum(p.numel() for p in trained(model).values()) < before / 2
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trained(model).values()} == {id(p) for p in optimizer.state}
    for p, state in optimizer.state.items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape
    assert not model.base_model.methods["default"].budget.smoothed
    layer = model.base_model.model.layers[0]
    assert layer.scaling["default"] == pytest.approx(6 / 4.00001) and layer.ranknum["default"].tolist() == [
        4.0
    ]


def test_a_graph_from_before_the_last_allocation_is_still_good() -> None:
    model = adapted()
    optimizer = adamw(trained(model).values())
    run(model, optimizer, range(10))
    model(inputs(10)).loss.backward()
    optimizer.step()
    old = trained(model)
    kept = model(inputs(50)).loss
    model.update_and_allocate(10)
    optimizer.zero_grad()
    assert set(map(id, old.values())) != set(map(id, trained(model).values()))
    kept.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in old.values())
    run(model, optimizer, range(11, 14))


def test_unknown_holders_of_parameters_keep_them_and_the_file_is_small(tmp_path: Path) -> None:
    model = adapted()
    mirror = {name: torch.zeros_like(p) for name, p in trained(model).items()}  # an optimizer of another kind

    def step(number: int) -> None:
        model(inputs(number)).loss.backward()
        with torch.no_grad():
            for name, p in trained(model).items():
                p -= 0.1 * mirror[name].mul_(0.9).add_(p.grad)
        model.update_and_allocate(number)
        model.zero_grad()

    for number in range(10):
        step(number)
    with pytest.warns(PeftWarning, match="stay in memory as zeros.*no optimizer of PyTorch is known"):
        step(10)
    for number in (11, 12):
        step(number)
    live = sum(int((p != 0).sum()) for name, p in trained(model).items() if "lora_E" in name)
    assert live == 4 == sum(ranks(model).values())
    assert all(p.shape == mirror[name].shape for name, p in trained(model).items())
    model.save_pretrained(tmp_path)
    assert logits(model).equal(logits(read(tmp_path)))
    assert torch.allclose(logits(model), logits(read(tmp_path, peft)), atol=1e-6)
    assert sum(p.shape[0] for name, p in read(tmp_path).named_parameters() if "lora_E" in name) == 4


def test_a_distributed_run_keeps_its_parameters_and_ends_alike(tmp_path: Path) -> None:
    finished().save_pretrained(tmp_path / "alone")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = adapted(orth_reg_weight=0.0)  # the penalty sees the ranks that are at zero
        parallel = nn.parallel.DistributedDataParallel(model)
        held, optimizer = set(map(id, trained(model).values())), adamw(trained(model).values())
        for step in range(14):
            parallel(inputs(step)).loss.backward()
            optimizer.step()
            model.update_and_allocate(step)
            optimizer.zero_grad()
        assert held == set(map(id, trained(model).values()))
        model.save_pretrained(tmp_path / "together")
    finally:
        torch.distributed.destroy_process_group()
    alone = finished(orth_reg_weight=0.0)
    assert ranks(model) == ranks(alone)
    assert torch.allclose(logits(read(tmp_path / "together")), logits(alone), atol=1e-6)


@pytest.mark.parametrize(
    "kind", ["conv2d_groups", "embedding", "experts", "experts_two", "gpt2_conv1d", "mha"]
)
def test_ranks_go_on_every_kind_of_layer(kind: str) -> None:
    case = next(k for k in KINDS if k.name == kind)
    where: Any = dict(case.where)
    plan = {"init_r": 6, "target_r": 2, "total_step": 6, "tfinal": 1, "orth_reg_weight": 0.1}
    model = get_peft_model(case.build(), AdaLoraConfig(**where, **plan))
    optimizer, x = adamw(trained(model).values()), case.inputs()
    for step in range(8):
        (((model(x) - 1) ** 2).mean() + model.penalty()).backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
    assert sum(ranks(model).values()) == 2 * len(ranks(model)) == 2 * len(case.spots)
    model.eval()
    y = model(x)
    model.merge_adapter()
    assert torch.allclose(model(x), y, atol=1e-6)


# ---------------------------------------------------------------------- files


def read(folder: Path, library: Any = inlay, **changes: Any) -> Any:
    return library.PeftModel.from_pretrained(Net0(), folder, **changes)


def Net0() -> Net:
    torch.manual_seed(0)
    return Net()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    y: Tensor = model.eval()(inputs(99)).logits
    return y


def test_pruned_files_go_both_ways(tmp_path: Path) -> None:
    mine, theirs = finished(), adapted(peft)
    assert 0 in ranks(mine).values()
    run(theirs, adamw(trained(theirs).values()), range(13))
    for library, model in ((inlay, mine), (peft, theirs)):
        folder = tmp_path / library.__name__
        model.save_pretrained(folder)
        for reader in (inlay, peft):
            loaded = read(folder, reader)
            assert torch.allclose(logits(loaded), logits(model), atol=1e-6)
            kept = pattern(model)
            for name, p in loaded.named_parameters():
                if "lora_E" in name:
                    path = name.removeprefix("base_model.model.").removesuffix(".default")
                    assert p.shape == (sum(kept[path]), 1)
        read(folder).save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())[
            "rank_pattern"
        ] == pattern(model)
        loaded = read(folder, low_cpu_mem_usage=True)
        assert torch.allclose(logits(loaded), logits(model), atol=1e-6)
        assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.parametrize("stop", [5, 12])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(stop: int, tmp_path: Path) -> None:
    whole = adapted()
    losses = run(whole, adamw(trained(whole).values()), range(16))
    model = adapted()
    optimizer = adamw(trained(model).values())
    run(model, optimizer, range(stop))
    model.save_pretrained(tmp_path)
    assert (tmp_path / STATE_NAME).exists() == (stop == 5)
    assert torch.allclose(logits(model), logits(read(tmp_path, peft)), atol=1e-6)
    resumed = read(tmp_path, is_trainable=True).train()
    again = adamw(trained(resumed).values())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert run(resumed, again, range(stop, 16)) == losses[stop:]
    assert ranks(resumed) == ranks(whole)
    resumed.save_pretrained(tmp_path)
    assert not (tmp_path / STATE_NAME).exists()


def test_a_damaged_state_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = adapted()
    run(model, adamw(trained(model).values()), range(5))
    model.save_pretrained(tmp_path)
    other, state = adapted(), tmp_path / STATE_NAME
    before = {name: p.clone() for name, p in other.named_parameters()}
    content = state.read_bytes()
    for damaged in (content[:-9], content.replace(b"layers.0", b"layers.7")):
        state.write_bytes(damaged)
        with pytest.raises((AdapterFileError, ValueError), match=r"cannot be read|does not fit"):
            other.load_adapter(tmp_path, "default")
        with pytest.raises((AdapterFileError, ValueError), match=r"cannot be read|does not fit"):
            read(tmp_path, is_trainable=True)
    assert set(read(tmp_path).peft_config) == {"default"}  # frozen, it needs no state
    for name, p in other.named_parameters():
        assert name in before and p.shape == before[name].shape


def test_an_adapter_in_place_takes_the_ranks_of_a_file(tmp_path: Path) -> None:
    done = finished()
    done.save_pretrained(tmp_path / "done")
    middle = adapted()
    run(middle, adamw(trained(middle).values()), range(5))
    middle.save_pretrained(tmp_path / "middle")
    model = adapted()
    for name, source in (("done", done), ("middle", middle), ("done", done)):
        model.load_adapter(tmp_path / name, "default")
        assert torch.equal(logits(model), logits(source))
        assert ranks(model) == ranks(source) and all(p.requires_grad for p in trained(model).values())
        assert len(trained(model)) == 12
    weights = tmp_path / "done" / "adapter_model.safetensors"
    weights.write_bytes((tmp_path / "middle" / "adapter_model.safetensors").read_bytes())
    model.load_adapter(tmp_path / "middle", "default")
    with pytest.raises(AdapterFileError, match="size mismatch"):
        model.load_adapter(tmp_path / "done", "default")
    assert torch.equal(logits(model), logits(middle)) and model.peft_config["default"].rank_pattern is None


# ---------------------------------------------------------------------- reports, forgetting, running


def test_ranks_are_reported_as_json_and_as_a_heat_map(tmp_path: Path) -> None:
    model = adapted()
    assert set(inlay.rank_report(model).values()) == {4}
    model = finished()
    found = inlay.write_rank_report(model, tmp_path)
    assert list(found) == [f"layers.{n}" for n in range(4)] and sum(found.values()) == 4
    assert json.loads((tmp_path / "ranks.json").read_text()) == {"ranks": found, "total": 4}
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no adapter 'other' with ranks"):
        inlay.rank_report(model, "other")
    lora = get_peft_model(Net0(), LoraConfig(target_modules=["0"], r=3))
    assert inlay.rank_report(lora) == {"layers.0": 3}


def test_a_loop_that_never_prunes_is_told_once() -> None:
    model = adapted()
    optimizer = adamw(trained(model).values())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(9):
            for _ in range(2):  # accumulated gradients are one step
                model(inputs(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert len(told) == (step >= 6), step
    assert "call model.update_and_allocate(step) after each optimizer.step()" in str(told[0].message)


def test_a_compiled_model_trains_alike() -> None:
    eager, model = adapted(), adapted()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(inputs(0)).loss.backward()
    eager(inputs(0)).loss.backward()
    for name, p in trained(eager).items():
        assert torch.allclose(trained(model)[name].grad, p.grad, atol=1e-6)


def test_a_copy_goes_on_by_itself() -> None:
    model = adapted()
    optimizer = adamw(trained(model).values())
    run(model, optimizer, range(5))
    copied, second = copy.deepcopy((model, optimizer))
    first = run(model, optimizer, range(5, 14))
    assert run(copied, second, range(5, 14)) == first
    assert ranks(copied) == ranks(model)


def test_half_precision_keeps_float32_masters() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Net().bfloat16(), AdaLoraConfig(**settings()))
    optimizer = adamw(trained(model).values())
    for step in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            model(inputs(step).bfloat16()).loss.float().backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert sum(ranks(model).values()) == 4


def sorted_letters(count: int, seed: int) -> tuple[Tensor, Tensor]:
    letters = torch.randint(0, 3, (count, 6), generator=torch.Generator().manual_seed(seed))
    return letters, letters.sort(1, descending=True).values


def test_a_real_model_learns_to_sort_the_other_way(shared: Path) -> None:
    base = tf.AutoModelForCausalLM.from_pretrained(shared / "models" / "gpt-nano-sort-gpt2")
    plan = {"init_r": 6, "target_r": 4, "tinit": 40, "tfinal": 60, "deltaT": 5, "total_step": 200}
    names = ["c_attn", "c_proj", "c_fc"]
    config = AdaLoraConfig(
        target_modules=names, lora_alpha=24, orth_reg_weight=0.1, task_type="CAUSAL_LM", **plan
    )
    model: PeftModel = get_peft_model(base, config)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    for step in range(200):
        letters, wanted = sorted_letters(32, step)
        ids = torch.cat([letters, wanted[:, :-1]], 1)
        labels = torch.cat([torch.full((32, 6), -100), wanted[:, :-1]], 1)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
    assert sum(ranks(model).values()) == 4 * 12 and len(set(ranks(model).values())) > 1
    letters, wanted = sorted_letters(200, 1_000)
    ids = letters
    for _ in range(5):
        ids = torch.cat([ids, model.eval()(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert (ids[:, 6:] == wanted[:, :5]).all(1).float().mean() > 0.9


def test_an_optimizer_with_other_shapes_cannot_follow() -> None:
    model = adapted()
    optimizer = torch.optim.Adafactor(trained(model).values())
    run(model, optimizer, range(10))
    with pytest.warns(PeftWarning, match="the state of Adafactor has other shapes than its parameters"):
        run(model, optimizer, range(10, 11))
    run(model, optimizer, range(11, 14))
    assert sum(ranks(model).values()) == 4
    assert hindrance([]) is None


def test_the_penalty_has_second_derivatives_and_none_where_factors_are_orthogonal() -> None:
    a = [torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    b = [torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)]

    def value(*matrices: Tensor) -> Tensor:
        return orthogonality(0.7, [matrices[:3], matrices[3:]], [False, True])

    wanted = [(m @ m.mT - torch.eye(2)).norm() for m in a] + [(m.mT @ m - torch.eye(3)).norm() for m in b[0]]
    assert torch.allclose(value(*a, *b), 0.7 * torch.stack(wanted).mean())
    assert torch.autograd.gradcheck(value, (*a, *b)) and torch.autograd.gradgradcheck(value, (*a, *b))
    straight = torch.eye(3, 5, requires_grad=True)
    orthogonality(1.0, [[straight]], [False]).backward()
    assert torch.equal(straight.grad, torch.zeros(3, 5))
