"""What ``test_hub`` runs in the process for which the stand-in is the hub. Results are plain values, which can be sent back."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import inlay

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def base_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def adapter(seed: int = 1, base: str | None = "user/base", **changes: Any) -> Any:
    """Return the base model with an adapter whose values are not those it starts with."""
    config = inlay.LoraConfig(target_modules=["0", "2"], r=2, base_model_name_or_path=base, **changes)
    model = inlay.get_peft_model(base_model(), config)
    with torch.no_grad():
        for n, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.copy_(torch.linspace(-seed, seed + n, p.numel()).reshape(p.shape))
    return model


def saved(folder: Path, **kwargs: Any) -> dict[str, bytes]:
    """Return the files that an adapter is saved as."""
    adapter(**kwargs).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def output(model: nn.Module) -> list[list[float]]:
    with torch.no_grad():
        y: Tensor = model(X)
    values: list[list[float]] = y.tolist()
    return values


def load(repository: str, **kwargs: Any) -> list[list[float]]:
    return output(inlay.PeftModel.from_pretrained(base_model(), repository, **kwargs))


def load_second(repository: str, **kwargs: Any) -> list[list[float]]:
    model = adapter()
    model.load_adapter(repository, "second", **kwargs)
    model.set_adapter("second")
    return output(model)


def load_config(repository: str, **kwargs: Any) -> dict[str, Any]:
    return inlay.PeftConfig.from_pretrained(repository, **kwargs).to_dict()


def fail_to_load(repository: str, **kwargs: Any) -> tuple[str, bool]:
    """Return the message of the ``ValueError``, and whether base model and loaded adapters are as they were."""
    bare, model = base_model(), adapter()
    names = [[name for name, _ in m.named_modules()] for m in (bare, model)]
    before = output(bare), output(model), [p.requires_grad for p in bare.parameters()]
    messages = []
    with mock.patch.object(time, "sleep"):  # the client waits before it tries again
        for attempt in (
            lambda: inlay.PeftModel.from_pretrained(bare, repository, **kwargs),
            lambda: model.load_adapter(repository, "second", **kwargs),
        ):
            try:
                attempt()
            except ValueError as error:
                messages.append(str(error))
    after = output(bare), output(model), [p.requires_grad for p in bare.parameters()]
    assert len(messages) == 2, "it was loaded"
    assert messages[0] == messages[1]
    unchanged = before == after and names == [[name for name, _ in m.named_modules()] for m in (bare, model)]
    return messages[0], unchanged and list(model.peft_config) == ["default"]


def save_without_network(folder: str) -> None:
    """Save an adapter of a base model on the hub, where every connection would raise."""
    refused = mock.Mock(side_effect=AssertionError("saving opened a connection"))
    with (
        mock.patch.multiple(socket.socket, connect=refused, connect_ex=refused),
        mock.patch.object(socket, "getaddrinfo", refused),
    ):
        adapter(base="user/base").save_pretrained(folder)


def push(repository: str, base: str | None = "user/base", **kwargs: Any) -> tuple[str, str]:
    """Push an adapter; return the commit's address and its hash."""
    commit: Any = adapter(base=base).push_to_hub(repository, **kwargs)
    return commit.commit_url, commit.oid


def load_auto(repository: str, **kwargs: Any) -> tuple[str, list[float]]:
    model = inlay.AutoPeftModelForCausalLM.from_pretrained(repository, **kwargs)
    with torch.no_grad():
        logits = model(torch.arange(5)[None]).logits
    return type(model).__name__, logits.flatten().tolist()
