"""Names, shapes, dtypes and flags of parameters in memory, and keys on disk, are PEFT's."""

from __future__ import annotations

import contextlib
import io
from dataclasses import asdict
from typing import Any

import peft
import pytest
import torch

import inlay
from peft_cross.conftest import Pair
from peft_cross.cross_cases import BY_NAME, CASES, CrossCase, constants_of, parameters_of


def described(model: Any) -> list[tuple[str, tuple[int, ...], torch.dtype, bool]]:
    return [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in parameters_of(model).items()]


def test_parameters_in_memory(pair: Pair) -> None:
    _, mine, theirs = pair
    assert sorted(described(mine)) == sorted(described(theirs))
    # PEFT keeps VeRA's shared pair in the state of every layer.
    repeated = (".vera_A.default", ".vera_B.default")
    assert set(mine.state_dict()) == {key for key in theirs.state_dict() if not key.endswith(repeated)}


def test_keys_on_disk(pair: Pair) -> None:
    _, mine, theirs = pair
    wanted, got = (
        peft.get_peft_model_state_dict(theirs),
        inlay.get_peft_model_state_dict(mine),
    )
    assert {key: value.shape for key, value in got.items()} == {
        key: value.shape for key, value in wanted.items()
    }
    assert all(torch.equal(got[key], value) for key, value in wanted.items())


INJECTED = [case for case in CASES if case.config != "VeraConfig"]  # which PEFT refuses


@pytest.mark.parametrize("case", INJECTED, ids=lambda case: case.name)
def test_keys_on_disk_of_an_injected_adapter(case: CrossCase) -> None:
    mine = inlay.inject_adapter_in_model(case.configuration(inlay), case.base())
    theirs = peft.inject_adapter_in_model(case.configuration(peft), case.base())
    assert sorted(described(mine)) == sorted(described(theirs))
    assert set(inlay.get_peft_model_state_dict(mine)) == set(peft.get_peft_model_state_dict(theirs))


def test_counts(pair: Pair) -> None:
    _, mine, theirs = pair
    trainable, total = theirs.get_nb_trainable_parameters()
    assert mine.get_nb_trainable_parameters() == (trainable, total - constants_of(theirs))
    if constants_of(theirs):
        return
    lines = []
    for model in (mine, theirs):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            model.print_trainable_parameters()
        lines.append(out.getvalue())
    assert lines[0] == lines[1]


def test_status(pair: Pair) -> None:
    _, mine, theirs = pair
    ours, wanted = ([asdict(layer) for layer in m.get_layer_status()] for m in (mine, theirs))
    for layers in (ours, wanted):
        for layer in layers:
            del layer["module_type"]
    assert sorted(ours, key=lambda layer: layer["name"]) == sorted(wanted, key=lambda layer: layer["name"])
    got, want = asdict(mine.get_model_status()), asdict(theirs.get_model_status())
    want["total_params"] -= constants_of(theirs)
    assert got.keys() == want.keys()
    assert {k: v for k, v in got.items() if k != "adapter_model_type"} == {
        k: v for k, v in want.items() if k != "adapter_model_type"
    }


def test_a_wrapped_layer_has_what_scripts_ask_for() -> None:
    layers = [m.base_model.model.encoder.layer[0].attention.self.query for m in BY_NAME["bert"].pair()]
    for layer in layers:
        layer.scale_layer(2.0)
    mine, theirs = layers
    for name in (
        "in_features",
        "out_features",
        "merged",
        "merged_adapters",
        "disable_adapters",
        "scaling",
        "r",
        "lora_alpha",
        "active_adapters",
    ):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert torch.equal(mine.weight, theirs.weight) and torch.equal(mine.bias, theirs.bias)
    assert isinstance(mine, inlay.LoraLayer) and isinstance(mine, inlay.BaseTunerLayer)
    assert type(mine.get_base_layer()) is torch.nn.Linear is type(mine.base_layer)
    assert torch.allclose(mine.get_delta_weight("default"), theirs.get_delta_weight("default"))
    for verb, arguments in [
        ("unscale_layer", (4.0,)),
        ("set_scale", ("default", 3.0)),
        ("unscale_layer", ()),
        ("set_scale", ("absent", 3.0)),
    ]:
        for layer in layers:
            getattr(layer, verb)(*arguments)
        assert mine.scaling == theirs.scaling, verb
