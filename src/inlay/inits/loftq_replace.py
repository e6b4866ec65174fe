"""LoftQ's start for a base that is quantised already: factors that make up for what it lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..files.folder import locate
from ..injection.walk import adapted_layers
from .decompose import check_decomposable, leading_part, set_factors

if TYPE_CHECKING:
    from ..method import Slot
    from ..peft_model import PeftModel

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: PeftModel,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Set a LoRA adapter's factors to the leading part of what the base weights lack of the model's file.

    Args:
        peft_model: a model whose base weights are quantised, or differ from the file in another way.
        model_path: the model's safetensors file or folder; by default where the base model was loaded from.
        adapter_name: which adapter.
        callback: called with the model and a layer's path after each layer; where it returns False, the
            layer's factors are put back. It may see whether the outputs came closer to the original model's.

    Raises:
        ValueError: there is no such file or tensor, a rank is too large, or no base weight differs from it.
    """
    origin = model_path or getattr(peft_model.get_base_model(), "name_or_path", None)
    if not origin:
        raise ValueError(
            "it is unknown where the base model was loaded from; pass model_path, its file or folder"
        )
    read = _reader(origin, getattr(peft_model.get_base_model(), "base_model_prefix", ""))
    slots = [
        (path, w.slots[adapter_name])
        for path, w in adapted_layers(peft_model.get_base_model())
        if adapter_name in w.slots and w.slots[adapter_name].owner is None
    ]
    for path, slot in slots:
        check_decomposable(slot.kind, slot.config, slot["r"], path)
    replaced = False
    for path, slot in slots:
        lost = (
            slot.kind.matrix(read(f"{path}.{slot.kind.param}").to(slot.weight().device, torch.float32))
            - slot.weight().float()
        )
        if not lost.any():
            continue
        replaced, before = True, {name: p.detach().clone() for name, p in slot.parameters().items()}
        _make_up_for(slot, lost)
        if callback is not None and not callback(peft_model, path):
            for name, p in slot.parameters().items():
                p.copy_(before[name])
    if not replaced:
        raise ValueError(
            f"no base weight under adapter {adapter_name!r} differs from {origin}; nothing was lost"
        )


def _make_up_for(slot: Slot, lost: Tensor) -> None:
    from ..methods.dora import row_norm

    u, s, vh = leading_part(lost, slot["r"])
    root = (s / slot["scaling"]).sqrt()
    set_factors(slot, u * root, root[:, None] * vh)
    if (magnitude := slot.get("lora_magnitude_vector")) is not None:
        magnitude.weight.copy_(row_norm(slot, slot.weight()).reshape(magnitude.weight.shape))


def _reader(origin: str | os.PathLike[str], prefix: str) -> Callable[[str], Tensor]:
    """Return a function that reads a tensor by its name in the model, or by that name without the prefix."""
    files = dict(_files(origin))

    def read(name: str) -> Tensor:
        key = name if name in files else name.removeprefix(f"{prefix}.")
        if key not in files:
            raise ValueError(
                f"{origin} holds no tensor {name}; pass model_path of the model that was quantised"
            )
        with safe_open(files[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    return read


def _files(origin: str | os.PathLike[str]) -> Iterator[tuple[str, Path]]:
    """Yield each tensor's name and the file that holds it."""
    try:
        path = Path(origin) if Path(origin).is_file() else locate(origin, FILE)
    except ValueError:
        index: dict[str, Any] = json.loads(locate(origin, INDEX).read_text(encoding="utf-8"))
        yield from ((key, locate(origin, name)) for key, name in index["weight_map"].items())
        return
    with safe_open(path, framework="pt") as file:
        yield from ((key, path) for key in file.keys())  # noqa: SIM118
