"""Checkpoints of what is trained: what is in them, which are kept, what loading refuses, and going on as if nothing had happened."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from inlay import (
    AdapterFileError,
    LoraConfig,
    PeftModel,
    ShiraConfig,
    TrainableParamsCheckpoint,
    freeze_delta,
    get_peft_model,
)

Checkpoint = TrainableParamsCheckpoint


class Net(nn.Module):
    """A body, a BatchNorm, a head, and two buffers that never change."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("passing", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = self.head(torch.relu(self.norm(self.body(x))))
        return y if labels is None else {"loss": nn.functional.cross_entropy(y, labels), "logits": y}


STATISTICS = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    freeze_delta(model, "bitfit", exclude=["head*"])
    return model


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)


def train_once(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    draw = torch.Generator().manual_seed(number)
    x, y = torch.randn(8, 6, generator=draw), torch.randint(0, 3, (8,), generator=draw)
    optimizer.zero_grad()
    model.train()(x, y)["loss"].backward()
    optimizer.step()


def files(folder: Path, ending: str = ".safetensors") -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(ending))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


# ---------------------------------------------------------------------- names and retention, as MindPet's


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    cases: dict[str, Any] = json.loads((shared / "goldens" / "mindpet" / "checkpoint.json").read_text())[
        "cases"
    ]
    return cases


RUNS = {
    "every1_keep3": ({"prefix": "m", "save_checkpoint_steps": 1, "keep_checkpoint_max": 3}, False),
    "every3_keep5": ({"prefix": "m", "save_checkpoint_steps": 3, "keep_checkpoint_max": 5}, True),
    "default_cfg": ({"prefix": "m"}, False),
    "keep_per_min": ({"prefix": "m", "keep_checkpoint_per_n_minutes": 10}, False),
}


@pytest.mark.parametrize("case", RUNS)
def test_names_and_retention_are_mindpets(tmp_path: Path, golden: dict[str, Any], case: str) -> None:
    settings, save_at_the_end = RUNS[case]
    model, checkpoint = net(), Checkpoint(tmp_path, steps_per_epoch=7, **settings)
    for _ in range(14):
        checkpoint.step(model)
    if save_at_the_end:
        checkpoint.save(model)
    assert files(tmp_path) == [name.replace(".ckpt", ".safetensors") for name in golden[case]["files"]]
    newest = Checkpoint.latest(tmp_path, "m")
    assert newest is not None and newest.name == golden[case]["latest"].replace(".ckpt", ".safetensors")


def test_all_are_kept_and_default_names(tmp_path: Path) -> None:
    model, checkpoint = net(), Checkpoint(tmp_path, keep_checkpoint_max=0)
    paths = [checkpoint.step(model) for _ in range(12)]
    assert paths == [tmp_path / f"DELTA_CKP-1_{n}.safetensors" for n in range(1, 13)]
    assert len(files(tmp_path)) == 12 and Checkpoint.latest(tmp_path) == paths[-1]


def test_one_of_every_so_many_minutes_and_the_newest(tmp_path: Path) -> None:
    model, checkpoint = net(), Checkpoint(tmp_path, keep_checkpoint_per_n_minutes=2)
    for minute in range(6):
        path = checkpoint.step(model)
        assert path is not None
        os.utime(path, (60 * minute, 60 * minute))
    assert files(tmp_path) == [f"DELTA_CKP-1_{n}.safetensors" for n in (1, 3, 5, 6)]


def test_the_newest_is_the_last_saved_whatever_name_and_date_say(tmp_path: Path) -> None:
    model = net()
    late = Checkpoint(tmp_path, steps_per_epoch=2)
    for _ in range(8):
        late.step(model)
    again = Checkpoint(tmp_path, steps_per_epoch=2, keep_checkpoint_max=2).step(model)
    assert again is not None and again.name == "DELTA_CKP-1_1.safetensors"
    assert files(tmp_path) == ["DELTA_CKP-1_1.safetensors", "DELTA_CKP-4_2.safetensors"]
    os.utime(again, (0, 0))
    assert Checkpoint.latest(tmp_path) == again


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    names = ["DELTA_CKP-1_1.safetensors", "DELTA_CKP-x.safetensors", "other-1_1.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(b"not mine")
    assert Checkpoint.latest(tmp_path) is None and Checkpoint.latest(tmp_path / "none") is None
    model, checkpoint = net(), Checkpoint(tmp_path, keep_checkpoint_max=1, steps_per_epoch=1)
    checkpoint.steps = 1
    checkpoint.step(model)
    checkpoint.step(model)
    assert files(tmp_path) == sorted([*names, "DELTA_CKP-3_1.safetensors"])


# ---------------------------------------------------------------------- what is in a file


def test_exactly_what_training_changes_is_saved(tmp_path: Path) -> None:
    model, checkpoint = net(), Checkpoint(tmp_path)
    before, optimizer = state(model), adam(model)
    checkpoint.begin(model)
    train_once(model, optimizer, 0)
    path = checkpoint.step(model)
    assert path is not None
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    tensors = load_file(path)
    assert tensors.keys() == changed == STATISTICS | {"body.bias", "head.weight", "head.bias"}
    for key, value in tensors.items():
        assert torch.equal(value, model.state_dict()[key])


def test_without_begin_every_lasting_buffer_is_saved(tmp_path: Path) -> None:
    tensors = load_file(Checkpoint(tmp_path).save(net()))
    assert tensors.keys() == STATISTICS | {"table", "body.bias", "head.weight", "head.bias"}


def test_statistics_that_stand_still_are_not_saved(tmp_path: Path) -> None:
    model, checkpoint = net(), Checkpoint(tmp_path)
    checkpoint.begin(model)
    model.norm.eval()
    model.head(torch.relu(model.norm(model.body(torch.randn(4, 6))))).sum().backward()
    assert not STATISTICS & load_file(checkpoint.save(model)).keys()


def test_an_adapter_and_its_head(tmp_path: Path) -> None:
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    checkpoint = Checkpoint(tmp_path)
    checkpoint.begin(model)
    assert load_file(checkpoint.save(model)).keys() == trained


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        model, checkpoint = net(), Checkpoint(tmp_path / name)
        train_once(model, adam(model), 0)
        contents.append(checkpoint.save(model).read_bytes())
    assert contents[0] == contents[1]


def test_tied_and_strided_parameters_survive(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(4, 6, bias=False), "b": nn.Linear(4, 6, bias=False)})
        model["b"].weight = model["a"].weight
        flat = torch.randn(40)
        model["c"], model["d"] = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        model["c"].weight = nn.Parameter(flat[:16].view(4, 4).T)
        model["d"].weight = nn.Parameter(flat[16:32].view(4, 4))
        return model

    model, fresh = build(), build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    path = Checkpoint(tmp_path).save(model)
    Checkpoint.load(fresh, path)
    assert_same(fresh, state(model))
    assert fresh["a"].weight is fresh["b"].weight  # type: ignore[index]


def test_wrappers_of_compile_do_not_change_names(tmp_path: Path) -> None:
    model = net()
    path = Checkpoint(tmp_path).save(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    assert "head.weight" in load_file(path)
    Checkpoint.load(torch.compile(net(), backend="eager"), path)  # type: ignore[arg-type]


def test_a_failed_save_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inlay.training import trainable_checkpoint

    model, checkpoint = net(), Checkpoint(tmp_path)
    content = checkpoint.save(model).read_bytes()

    def full(*args: Any, **kwargs: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainable_checkpoint, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(model)
    monkeypatch.undo()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="is as it was: No space left"):
        checkpoint.save(model)
    assert [path.name for path in tmp_path.iterdir()] == ["DELTA_CKP-1_1.safetensors"]
    assert (tmp_path / "DELTA_CKP-1_1.safetensors").read_bytes() == content


# ---------------------------------------------------------------------- loading


def trained_file(folder: Path, build: Callable[[], nn.Module] = net, seed: int = 0) -> tuple[Path, nn.Module]:
    """A checkpoint after three steps, and the model it is of."""
    model, checkpoint = build(), Checkpoint(folder)
    checkpoint.begin(model)
    optimizer = adam(model)
    for number in range(3):
        train_once(model, optimizer, number)
        checkpoint.step(model, optimizer)
    path = Checkpoint.latest(folder)
    assert path is not None
    return path, model


def test_loading_brings_back_all_of_it(tmp_path: Path) -> None:
    path, model = trained_file(tmp_path)
    fresh = net()
    Checkpoint.load(fresh, path)
    assert_same(fresh, state(model))
    untouched = Net()  # which parameters it trains does not matter
    untouched.load_state_dict(net().state_dict())
    Checkpoint.load(untouched, str(path))
    assert_same(untouched, state(model))


def test_a_new_random_head_does_not_make_another_base(tmp_path: Path) -> None:
    def build(seed: int) -> nn.Module:
        base = net()
        torch.manual_seed(seed)
        base.head.reset_parameters()
        return get_peft_model(base, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))

    path, model = trained_file(tmp_path, lambda: build(1))
    fresh = build(2)
    Checkpoint.load(fresh, path)
    x = torch.randn(4, 6)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def another_value(model: Net) -> None:
    with torch.no_grad():
        model.body.weight[0, 0] += 1


def another_name(model: Net) -> None:
    model.extra = nn.Linear(1, 1)


def another_type(model: Net) -> None:
    model.body.weight.data = model.body.weight.data.bfloat16()


def another_table(model: Net) -> None:
    model.table[1] += 1


def another_head(model: Net) -> None:
    model.head = nn.Linear(5, 4)


def renamed_head(model: Net) -> None:
    model.heads = model.head
    del model.head


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (another_value, "frozen values differ"),
        (another_table, "frozen values differ"),
        (another_name, "differ in name, shape or dtype"),
        (another_type, "differ in name, shape or dtype"),
        (another_head, r"'head.bias' of shape \[3\]; the model's is \[4\]"),
        (renamed_head, r"holds 'head.bias', which the model lacks \(it has 'heads.bias'\)"),
    ],
)
def test_another_model_is_refused_and_left_as_it_was(
    tmp_path: Path, change: Callable[[Net], None], told: str
) -> None:
    path, _ = trained_file(tmp_path)
    model = net()
    change(model)
    before, optimizer = state(model), adam(model)
    with pytest.raises(AdapterFileError, match=told):
        Checkpoint.load(model, path, optimizer)
    assert_same(model, before)
    assert not optimizer.state


def test_another_base_is_taken_on_request(tmp_path: Path) -> None:
    path, model = trained_file(tmp_path)
    half = net().bfloat16()
    Checkpoint.load(half, path, check_base=False)
    assert torch.equal(half.head.weight, model.head.weight.bfloat16())  # type: ignore[union-attr, operator]
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(AdapterFileError, match="on the meta device and takes no values"):
        Checkpoint.load(empty, path, check_base=False)


@pytest.mark.parametrize(
    ("damage", "error", "told"),
    [
        (lambda path: path.unlink(), FileNotFoundError, "there is no checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), AdapterFileError, "may be truncated"),
        (lambda path: path.write_bytes(b""), AdapterFileError, "may be truncated"),
        (
            lambda path: path.write_bytes(foreign()),
            AdapterFileError,
            "was not saved by TrainableParamsCheckpoint",
        ),
    ],
)
def test_broken_files(
    tmp_path: Path, damage: Callable[[Path], Any], error: type[Exception], told: str
) -> None:
    path, _ = trained_file(tmp_path)
    damage(path)
    model = net()
    before = state(model)
    with pytest.raises(error, match=told):
        Checkpoint.load(model, path)
    assert_same(model, before)


def foreign() -> bytes:
    from safetensors.torch import save

    return save({"head.bias": torch.zeros(3)})


# ---------------------------------------------------------------------- going on


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def run(folder: Path, stop: int) -> nn.Module:
        model = net()
        optimizer, checkpoint = adam(model), Checkpoint(folder, save_checkpoint_steps=2, steps_per_epoch=4)
        checkpoint.resume(model, optimizer)
        for number in range(checkpoint.steps, stop):
            train_once(model, optimizer, number)
            checkpoint.step(model, optimizer)
        return model

    whole = run(tmp_path / "whole", 8)
    run(tmp_path / "cut", 5)  # killed after the save at 4
    resumed = run(tmp_path / "cut", 8)
    assert_same(resumed, state(whole))
    for name in files(tmp_path / "whole"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert files(tmp_path / "cut", ".optimizer.pt") == [
        name.replace(".safetensors", ".optimizer.pt") for name in files(tmp_path / "cut")
    ]


def test_statistics_that_changed_before_a_resume_stay_in_the_files(tmp_path: Path) -> None:
    path, _ = trained_file(tmp_path)
    model, checkpoint = net(), Checkpoint(tmp_path)
    assert checkpoint.resume(model) == path and checkpoint.steps == 3
    assert load_file(checkpoint.save(model)).keys() >= STATISTICS


def test_resuming_without_files_begins(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "none")
    assert checkpoint.resume(net()) is None and checkpoint.steps == 0


def other_groups(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([{"params": [p]} for p in model.parameters() if p.requires_grad])


def other_order(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad][::-1])


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (other_groups, r"groups of \[3\] parameters, not \[1, 1, 1\]"),
        (other_order, "exp_avg of parameter 0 has shape"),
    ],
)
def test_another_optimizer_is_refused(
    tmp_path: Path, make: Callable[[nn.Module], torch.optim.Optimizer], told: str
) -> None:
    path, _ = trained_file(tmp_path)
    model = net()
    before, optimizer = state(model), make(model)
    groups = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(AdapterFileError, match=told):
        Checkpoint.load(model, path, optimizer)
    assert_same(model, before)
    assert optimizer.state_dict() == groups


def test_a_state_that_is_not_there_or_broken(tmp_path: Path) -> None:
    path, _ = trained_file(tmp_path)
    beside = path.with_suffix(".optimizer.pt")
    model = net()
    for content in (beside.read_bytes()[:40], b""):
        beside.write_bytes(content)
        with pytest.raises(AdapterFileError, match="may be truncated"):
            Checkpoint.load(model, path, adam(model))
    torch.save([1], beside)
    with pytest.raises(AdapterFileError, match="holds no optimizer's state"):
        Checkpoint.load(model, path, adam(model))
    beside.unlink()
    with pytest.raises(FileNotFoundError, match="there is no optimizer's state"):
        Checkpoint.load(model, path, adam(model))
    assert_same(model, state(net()))


# ---------------------------------------------------------------------- transformers' Trainer


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 26

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(number)
        return {"x": torch.randn(6, generator=draw), "labels": torch.tensor(number % 3)}


def trainer(model: nn.Module, folder: Path, checkpoint: Checkpoint, **more: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2,
        "learning_rate": 0.05, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no",
        "dataloader_pin_memory": False, "logging_strategy": "no",
    } | more  # fmt: skip
    return Trainer(model, TrainingArguments(**settings), train_dataset=Rows(), callbacks=[checkpoint])  # type: ignore[arg-type]


def test_as_a_callback(tmp_path: Path) -> None:
    model, folder = net(), tmp_path / "run"
    before = state(model)
    trainer(model, tmp_path, Checkpoint(folder, "m", keep_checkpoint_max=3)).train()
    assert files(folder) == [
        "m-2_5.safetensors",
        "m-2_6.safetensors",
        "m-2_7.safetensors",
    ]  # 13 batches, 7 steps
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    newest = Checkpoint.latest(folder, "m")
    assert newest is not None and load_file(newest).keys() == changed > STATISTICS
    fresh = net()
    Checkpoint.load(fresh, newest)
    assert_same(fresh, state(model))


@pytest.mark.parametrize("steps", [5, 14])
def test_a_callback_saves_the_last_step_once(tmp_path: Path, steps: int) -> None:
    checkpoint = Checkpoint(tmp_path / "run", save_checkpoint_steps=3, steps_per_epoch=10)
    trainer(net(), tmp_path, checkpoint, max_steps=steps).train()
    expected = {5: ["1_3", "1_5"], 14: ["1_3", "1_6", "1_9", "2_2", "2_4"]}[steps]
    assert files(tmp_path / "run") == [f"DELTA_CKP-{name}.safetensors" for name in expected]
    with safe_open(tmp_path / "run" / f"DELTA_CKP-{expected[-1]}.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["inlay_checkpoint"])["number"] == len(expected) - 1


def test_a_callback_saves_where_training_stops_early(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    run = trainer(net(), tmp_path, Checkpoint(tmp_path / "run", save_checkpoint_steps=3))
    run.add_callback(Stop())
    run.train()
    assert files(tmp_path / "run") == ["DELTA_CKP-1_3.safetensors", "DELTA_CKP-1_4.safetensors"]


def test_a_resumed_trainer_goes_on_counting(tmp_path: Path) -> None:
    def run(stop: int) -> nn.Module:
        model = net()
        again = list(tmp_path.glob("checkpoint-*"))
        checkpoint = Checkpoint(tmp_path / "run", keep_checkpoint_max=2)
        engine = trainer(model, tmp_path, checkpoint, save_strategy="steps", save_steps=4, max_steps=stop)
        engine.train(resume_from_checkpoint=str(again[0]) if again else None)
        return model

    run(4)
    model = run(9)
    assert files(tmp_path / "run") == ["DELTA_CKP-2_1.safetensors", "DELTA_CKP-2_2.safetensors"]
    fresh = net()
    Checkpoint.load(fresh, tmp_path / "run" / "DELTA_CKP-2_2.safetensors")
    assert_same(fresh, state(model))


# ---------------------------------------------------------------------- requests that cannot be met


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"directory": None}, ValueError, "directory is empty"),
        ({"directory": ""}, ValueError, "directory is empty"),
        ({"directory": 3}, TypeError, "directory must be a string or a path, not int"),
        ({"prefix": 3}, TypeError, "prefix must be a string, not int"),
        ({"prefix": ""}, ValueError, "prefix must be the beginning of a file's name, not ''"),
        ({"prefix": "a/b"}, ValueError, "not 'a/b'"),
        ({"save_checkpoint_steps": 0}, ValueError, "save_checkpoint_steps must be 1 or more, not 0"),
        ({"save_checkpoint_steps": None}, TypeError, "must be a whole number, not None"),
        ({"save_checkpoint_steps": True}, TypeError, "must be a whole number, not True"),
        ({"keep_checkpoint_max": -1}, ValueError, "keep_checkpoint_max must be 0 or more, not -1"),
        ({"keep_checkpoint_max": 2.0}, TypeError, "must be a whole number, not 2.0"),
        ({"steps_per_epoch": 0}, ValueError, "steps_per_epoch must be 1 or more"),
        ({"keep_checkpoint_per_n_minutes": 0}, ValueError, "must be above 0, not 0"),
        ({"keep_checkpoint_per_n_minutes": "1"}, TypeError, "must be a number, not '1'"),
        ({"keep_checkpoint_per_n_minutes": 1, "keep_checkpoint_max": 1}, ValueError, "not both"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        Checkpoint(**({"directory": "x"} | arguments))


def test_where_nothing_is_trained_nothing_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to save"):
        Checkpoint(tmp_path / "run").save(net().requires_grad_(False))
    assert not (tmp_path / "run").exists()


def test_it_is_an_ordinary_object_otherwise(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    assert copy.deepcopy(checkpoint).directory == tmp_path
    with pytest.raises(AttributeError, match="no attribute 'sav'"):
        checkpoint.sav  # noqa: B018


def test_values_inside_the_weight_do_not_make_it_another_base(tmp_path: Path) -> None:
    def adapted() -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(
            nn.Sequential(nn.Linear(16, 16)), ShiraConfig(r=1, target_modules=["0"], random_seed=0)
        )

    model, x = adapted(), torch.randn(3, 16)
    with torch.no_grad():
        for p in model.base_model.adapter_parameters("default"):
            p.normal_()
    y = model(x)  # writes the values into the weight
    path = TrainableParamsCheckpoint(tmp_path).save(model)
    fresh = adapted()
    TrainableParamsCheckpoint.load(fresh, path)
    assert torch.equal(fresh(x), y)
    assert torch.equal(model(x), y)
