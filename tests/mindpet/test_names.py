"""Where the layers are found, and that looking for them costs nothing before they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import inlay
from inlay import AdaptedLayer, LoraConfig, get_peft_model, mindpet
from inlay.mindpet import AdapterLayer, LoRADense


def test_the_package_is_an_attribute_of_inlay_but_not_imported_with_it() -> None:
    program = (
        "import sys, inlay; before = [m for m in sys.modules if 'mindpet' in m]; package = inlay.mindpet; "
        "between = [m for m in sys.modules if 'inlay.mindpet' in m]; package.PrefixLayer; "
        "print(before, between, 'inlay.mindpet.lora' in sys.modules, 'inlay.mindpet.prefix' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[] ['inlay.mindpet'] False True\n"


def test_public_names() -> None:
    assert inlay.mindpet is mindpet
    assert mindpet.LoRADense is LoRADense
    assert all(getattr(mindpet, name).__name__ == name for name in mindpet.__all__)
    with pytest.raises(AttributeError, match=r"'inlay\.mindpet' has no attribute 'LoraDense'"):
        mindpet.LoraDense  # noqa: B018


def test_an_adapter_set_into_a_layer_keeps_the_update_of_its_own() -> None:
    """Its forward pass runs with the merged weight: no method takes the layer for a plain product."""
    layer = LoRADense(4, 3, 2, 4, lora_b_init="ones", activation="relu")
    x = torch.randn(5, 4)
    before = layer(x)
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    assert torch.equal(model(x), before)
    adapted = model.get_submodule("base_model.model.0")
    nn.init.ones_(adapted.lora_B.default.weight)
    delta = x @ adapted.lora_A.default.weight.T @ adapted.lora_B.default.weight.T
    own = 2 * x @ layer.mindpet_delta_lora_a.T @ layer.mindpet_delta_lora_b.T
    wanted = torch.relu(nn.functional.linear(x, layer.weight, layer.bias) + own + delta)
    torch.testing.assert_close(model(x), wanted)


def test_all_linear_leaves_the_layers_alone() -> None:
    model = nn.ModuleDict(
        {"own": LoRADense(4, 4, 2, 4), "adapter": AdapterLayer(4, 2), "plain": nn.Linear(4, 4)}
    )
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert [path for path, module in adapted.named_modules() if isinstance(module, AdaptedLayer)] == [
        "base_model.model.plain"
    ]
