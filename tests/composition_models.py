"""Models with several adapters that do something, for tests of compositions, and the same computed a second way in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay import BitFitConfig, IA3Config, LoraConfig, PeftConfig, PeftModel, ShiraConfig, get_peft_model
from tiny_models import tiny

WIDTH = 5
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


class Chain(nn.Module):
    """Two blocks of two linear layers with a non-linearity between them; reads and puts out [batch, sequence, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(WIDTH, WIDTH), "down": nn.Linear(WIDTH, WIDTH)}) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))  # type: ignore[index]
        return x


def configs() -> dict[str, PeftConfig]:
    """Return adapters that change every layer of a ``Chain``, additive ones first."""
    both = ["up", "down"]
    return {
        "lora": LoraConfig(r=2, lora_alpha=3, target_modules=both),
        "wide": LoraConfig(r=3, target_modules=both),
        "bitfit": BitFitConfig(target_modules=both),
        "dora": LoraConfig(r=2, use_dora=True, target_modules=both),
        "ia3": IA3Config(target_modules=both, feedforward_modules=["down"]),
        "shira": ShiraConfig(r=1, target_modules=both),
    }


ALL = tuple(configs())


def shake(model: PeftModel, *names: str) -> None:
    """Give adapters values under which each does something of its own."""
    for name in names:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        for p in model.base_model.adapter_parameters(name):
            p.data.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.4)


def with_adapters(model: nn.Module, chosen: dict[str, PeftConfig]) -> PeftModel:
    """Return a model with adapters, all of them shaken."""
    first, *others = chosen
    peft_model = get_peft_model(model, chosen[first], first)
    for name in others:
        peft_model.add_adapter(name, chosen[name])
    shake(peft_model, *chosen)
    return peft_model


def chain(*names: str, dtype: torch.dtype = torch.float64) -> PeftModel:
    """Return a ``Chain`` with some of the adapters."""
    torch.manual_seed(1)
    known = configs()
    return with_adapters(Chain().to(dtype), {name: known[name] for name in names or ALL})


def chain_input(batch: int = 3, length: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(2), dtype=dtype)


def bert_or_gpt2(name: str) -> PeftModel:
    """Return a tiny model in float64 with LoRA "a", LoRA "b" on other layers too, and (IA)3 "c"."""
    query, out = ("query", "output.dense") if name == "bert" else ("c_attn", "mlp.c_proj")
    return with_adapters(
        tiny(name, torch.float64),
        {
            "a": LoraConfig(r=2, target_modules=[query, out]),
            "b": LoraConfig(r=4, target_modules=[query]),
            "c": IA3Config(target_modules=[query, out], feedforward_modules=[out]),
        },
    )


def run(model: PeftModel, asked: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what a model puts out under a request."""
    model.set_adapter(asked)
    return model(*args, **kwargs)


def each_layer(model: PeftModel, rule: Any, x: Tensor) -> Tensor:
    """Return what a ``Chain`` puts out where ``rule(path, x, w, b)`` says what a linear layer makes of its input."""
    for i in range(2):
        w, b = {}, {}
        for part in ("up", "down"):
            layer = model.get_base_model().layers[i][part]  # type: ignore[index,union-attr]
            w[part], b[part] = layer.base_matrix(), layer.base_bias()
        inner = torch.tanh(rule(f"layers.{i}.up", x, w["up"], b["up"]))
        x = x + rule(f"layers.{i}.down", inner, w["down"], b["down"])
    return x


def weights_of(model: PeftModel, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the merged weight and bias of each layer under one adapter, as functions of its parameters."""
    found = {}
    for i in range(2):
        for part in ("up", "down"):
            layer = model.get_base_model().layers[i][part]  # type: ignore[index,union-attr]
            slot = layer.slots[name]
            found[f"layers.{i}.{part}"] = slot.method.merge(slot, layer.base_matrix(), layer.base_bias())
    return found
