"""Small models with SHiRA adapters, for its tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inlay import PeftModel, ShiraConfig, get_peft_model
from small_net import Net

TARGETS = ["q_proj", "v_proj"]
IDS = torch.arange(10).view(2, 5)


def shira(**settings: Any) -> ShiraConfig:
    return ShiraConfig(**({"r": 1, "target_modules": TARGETS, "random_seed": 3} | settings))


def net(width: int = 6) -> Net:
    torch.manual_seed(0)
    return Net(width)


def adapted(*names: str, width: int = 6, **settings: Any) -> PeftModel:
    """Return a model with trained adapters of these names, the first one active."""
    model = get_peft_model(net(width), shira(**settings), adapter_name=names[0] if names else "default")
    for seed, name in enumerate(names[1:], 4):
        model.add_adapter(name, shira(**({"random_seed": seed} | settings)))
    for name in names or ("default",):
        disturb(model, name)
    return model.eval()


@torch.no_grad()
def disturb(model: nn.Module, name: str = "default") -> None:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    for key, p in model.named_parameters():
        if f"shira_weight.{name}" in key:
            p += torch.randn(p.shape, generator=generator)


def layers(model: PeftModel) -> list[Any]:
    return list(model.base_model.layers())


def bases(model: PeftModel) -> list[Tensor]:
    """Return the weights as they stand in memory, whatever stands in them."""
    return [layer.get_base_layer().weight.detach().clone() for layer in layers(model)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    assert found.keys() == wanted.keys() and found
    return all(torch.allclose(found[k], wanted[k], rtol=1e-4, atol=1e-5) for k in wanted)


def refuse(message: str, config: ShiraConfig | Any) -> None:
    base = net()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert not any("shira" in name or "base_layer" in name for name, _ in base.named_modules())
