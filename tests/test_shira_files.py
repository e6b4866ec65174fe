"""Files of SHiRA, and PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from inlay import (
    AdapterFileError,
    LoraConfig,
    PeftModel,
    ShiraConfig,
    calibrate_shira,
    get_peft_model,
)
from shira_models import IDS, TARGETS, adapted, disturb, gradients, net, same, shira


def peft_model(**settings: Any) -> Any:
    model = peft.get_peft_model(
        net(40), peft.ShiraConfig(r=2, target_modules=TARGETS, random_seed=1, **settings)
    )
    disturb(model)
    return model.eval()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # in PEFT's forward
def test_files_both_ways_with_equal_outputs_and_gradients(tmp_path: Path) -> None:
    theirs = peft_model()
    theirs.save_pretrained(tmp_path / "theirs")
    mine = PeftModel.from_pretrained(net(40), tmp_path / "theirs", is_trainable=True)
    assert torch.allclose(mine(IDS), theirs(IDS), atol=1e-5)
    theirs(IDS).square().sum().backward()
    mine(IDS).square().sum().backward()
    assert same(gradients(mine), gradients(theirs))

    made = adapted(width=40)
    made.save_pretrained(tmp_path / "mine")
    back = peft.PeftModel.from_pretrained(net(40), tmp_path / "mine")
    assert torch.allclose(back(IDS), made(IDS), atol=1e-5)
    again = PeftModel.from_pretrained(net(40), tmp_path / "mine")
    assert torch.equal(again(IDS), made(IDS))
    again.save_pretrained(tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "mine" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_calibrated_and_custom_masks_come_from_the_file(
    tmp_path: Path, low_cpu_mem_usage: bool, is_trainable: bool
) -> None:
    config = calibrate_shira(net(), shira(mask_type="snip"), [IDS], lambda output, batch: output.sum())
    model = get_peft_model(net_of(config), config)
    disturb(model)
    model.eval().save_pretrained(tmp_path)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "is_trainable": is_trainable}
    loaded = PeftModel.from_pretrained(net(), tmp_path, **options)
    assert torch.equal(loaded(IDS), model(IDS))
    loaded.load_adapter(tmp_path, "second", **options)
    unfilled = get_peft_model(net(), loaded.peft_config["default"])  # a mask that only the file knows
    with pytest.raises(ValueError, match="read from a file"):
        unfilled(IDS)


def net_of(config: ShiraConfig) -> nn.Module:
    """Return a model whose layers are those that a configuration was calibrated on."""
    base = net()
    config.mask_fn = calibrate_shira(base, config, [IDS], lambda output, batch: output.sum()).mask_fn
    return base


def test_new_values_are_loaded_over_an_adapter_that_is_in_the_weight(tmp_path: Path) -> None:
    other = adapted(random_seed=9)
    other.save_pretrained(tmp_path)
    model = adapted()
    model(IDS)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(model(IDS), other(IDS))
    assert torch.equal(model.unload()(IDS), net()(IDS))


def test_a_file_is_at_most_twice_that_of_lora(tmp_path: Path) -> None:
    sizes = {}
    for name, config in {"shira": shira(r=8), "lora": LoraConfig(r=8, target_modules=TARGETS)}.items():
        model = get_peft_model(net(64), config)
        model.save_pretrained(tmp_path / name)
        sizes[name] = (tmp_path / name / "adapter_model.safetensors").stat().st_size
    assert sizes["shira"] <= 2 * sizes["lora"]


@pytest.mark.parametrize("damage", [lambda i: i + 6, lambda i: i * 0, lambda i: -i - 1])
def test_a_mask_that_does_not_fit_the_weight_is_an_error(tmp_path: Path, damage: Any) -> None:
    from safetensors.torch import load_file, save_file

    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    key = next(k for k in state if "shira_indices" in k)
    save_file(state | {key: damage(state[key])}, path, metadata={"format": "pt"})
    model = PeftModel.from_pretrained(net(), tmp_path)
    with pytest.raises(ValueError, match=r"outside of its weight .* or one place twice"):
        model(IDS)
    assert torch.equal(model.unload()(IDS), net()(IDS))


def test_a_file_of_another_rank_is_refused(tmp_path: Path) -> None:
    adapted(r=2).save_pretrained(tmp_path)
    model = adapted()
    y = model(IDS)
    with pytest.raises(AdapterFileError, match="size mismatch"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(model(IDS), y)
