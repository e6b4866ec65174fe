"""Masks of SHiRA: which entries are trained, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inlay import (
    calibrate_shira,
    get_peft_model,
    shira_overlap,
)
from shira_models import IDS, TARGETS, adapted, layers, net, refuse, shira


@pytest.mark.parametrize("mask_type", ["random", "struct", "wm"])
@pytest.mark.parametrize("r", [1, 2, 5])
def test_masks_have_r_entries_for_each_row_and_column(mask_type: str, r: int) -> None:
    base = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 20))
    model = get_peft_model(base, shira(r=r, mask_type=mask_type, target_modules=["0", "1"]))
    for layer in layers(model):
        rows, columns = layer.shira_indices["default"]
        shape = layer.get_base_layer().weight.shape
        assert len({(int(i), int(j)) for i, j in zip(rows, columns, strict=True)}) == r * sum(shape)
        assert int(rows.max()) < shape[0] and int(columns.max()) < shape[1]
        assert layer.shira_indices["default"].dtype == torch.int32


def test_one_seed_gives_other_masks_in_other_layers_and_the_same_ones_again() -> None:
    masks = [[layer.shira_indices["default"] for layer in layers(adapted(width=16))] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
    assert len({tuple(mask.flatten().tolist()) for mask in masks[0]}) == len(masks[0])
    unseeded = []
    for _ in range(2):
        base = net(16)
        torch.manual_seed(5)
        unseeded.append(layers(get_peft_model(base, shira(random_seed=None)))[0].shira_indices["default"])
    assert torch.equal(*unseeded) and not torch.equal(unseeded[0], masks[0][0])


def test_struct_is_the_diagonal_with_whole_rows_and_columns() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(30, 20)), shira(r=4, mask_type="struct", target_modules=["0"])
    )
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[tuple(layers(model)[0].shira_indices["default"].long())] = True
    assert mask.diagonal().all()
    assert int(mask.all(1).sum()) == 3 and int(mask.all(0).sum()) >= 3


def test_wm_takes_the_largest_weights() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(30, 20)), shira(mask_type="wm", target_modules=["0"]))
    layer = layers(model)[0]
    weight, chosen = layer.get_base_layer().weight.abs(), torch.zeros(20, 30, dtype=torch.bool)
    chosen[tuple(layer.shira_indices["default"].long())] = True
    assert float(weight[chosen].min()) >= float(weight[~chosen].max())


@pytest.mark.parametrize("mask_type", ["grad", "snip"])
def test_calibrated_masks_take_the_largest_gradients(mask_type: str) -> None:
    base = net(12).train()
    batches = [(IDS,), (IDS.flip(1),)]
    exact = copy.deepcopy(base)
    for batch in batches:
        exact(*batch).square().sum().backward()
    config = calibrate_shira(
        base, shira(mask_type=mask_type), batches, lambda output, batch: output.square().sum()
    )
    assert base.training and all(p.grad is None and p.requires_grad for p in base.parameters())
    model = get_peft_model(base, config)
    paths = [f"blocks.{n}.{name}" for n in (0, 1) for name in TARGETS]
    for layer, path in zip(layers(model), paths, strict=True):
        p = exact.get_parameter(f"{path}.weight")
        scores = p.grad.abs() if mask_type == "grad" else (p.grad * p).abs()
        rows, columns = layer.shira_indices["default"].long()
        wanted = scores.flatten().topk(len(rows)).indices.sort().values
        assert torch.equal(rows * 12 + columns, wanted)
    copy.deepcopy(model)
    pickle.loads(pickle.dumps(model))(IDS)


def test_masks_are_calibrated_on_an_adapted_model() -> None:
    model = adapted("a")
    y = model(IDS)
    config = calibrate_shira(model, shira(mask_type="snip"), [IDS], lambda output, batch: output.sum())
    assert torch.equal(model(IDS), y)
    model.add_adapter("b", config)
    assert shira_overlap(model).total.entries["b"] == 4 * 12


def test_a_mask_of_the_users_own() -> None:
    told: list[dict[str, Any]] = []

    def upper(base_layer: nn.Module, r: int, **kwargs: Any) -> Tensor:
        told.append(kwargs)
        mask = torch.zeros_like(base_layer.weight)
        mask[: 2 * r] = 1
        return mask

    config = shira(mask_type="upper")
    config.mask_fn = upper
    model = get_peft_model(net(), config)
    assert all(int(layer.shira_indices["default"][0].max()) == 1 for layer in layers(model))
    assert len({kwargs["random_seed"] for kwargs in told}) == 4
    assert "mask_fn" not in model.peft_config["default"].to_dict()


def test_overlap_of_adapters_that_are_fused() -> None:
    def rows(first: int) -> Any:
        def mask(base_layer: nn.Module, r: int, **kwargs: Any) -> Tensor:
            found = torch.zeros_like(base_layer.weight)
            found[first : first + 2] = 1
            return found

        return mask

    model = get_peft_model(net(), shira(mask_fn=rows(0)), adapter_name="a")
    model.add_adapter("b", shira(mask_fn=rows(1)))
    model.add_adapter("c", shira(mask_fn=rows(4), target_modules=["q_proj"]))
    report = shira_overlap(model, ["a", "b"])
    assert set(report.layers) == {f"blocks.{n}.{name}" for n in (0, 1) for name in TARGETS}
    assert all((o.changed, o.shared) == (18, 6) for o in report.layers.values())
    assert report.total.share == pytest.approx(1 / 3) and "33.33%" in str(report)
    assert shira_overlap(model, ["a", "c"]).total.shared == 0
    with pytest.raises(ValueError, match=r"have no SHiRA mask.*\['a', 'b', 'c'\]"):
        shira_overlap(model, ["a", "d"])
    with pytest.raises(ValueError, match="two adapters or more"):
        shira_overlap(model, ["a"])


def test_requests_that_cannot_be_met() -> None:
    with pytest.raises(ValueError, match="positive integer"):
        shira(r=0)
    refuse("more shira params than the total number.*choose r <= 3", shira(r=4))
    refuse("mask_type='sinp' is unknown", shira(mask_type="sinp"))
    refuse("calibrate_shira", shira(mask_type="snip"))
    refuse(
        "not the same dimensions.*36 ones", shira(mask_fn=lambda layer, r, **_: torch.ones_like(layer.weight))
    )
    refuse(r"shape \(6, 6\)", shira(mask_fn=lambda layer, r, **_: torch.ones(3)))
    with pytest.raises(ValueError, match="needs no calibration"):
        calibrate_shira(net(), shira(), [IDS])
    with pytest.raises(ValueError, match="no batches"):
        calibrate_shira(net(), shira(mask_type="grad"), [])
    with pytest.raises(ValueError, match="has no loss"):
        calibrate_shira(net(), shira(mask_type="grad"), [IDS])
    config = calibrate_shira(net(), shira(mask_type="grad"), [IDS], lambda output, batch: output.sum())
    refuse("calibrated on another model", config)
