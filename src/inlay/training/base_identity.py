"""Which base a checkpoint belongs to, told fast: a digest of names, shapes and dtypes, and one of sampled values."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from ..layers.extras import ModulesToSaveWrapper

SAMPLED = 64
"""How many values of each tensor tell a base apart; they are spread evenly, first and last among them."""


def lasting_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name; tied ones once, under their first name."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    for path, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                found[f"{path}.{leaf}" if path else leaf] = buffer
    return found


def bare(model: nn.Module) -> nn.Module:
    """Return the model inside what ``torch.compile`` and data parallelism put around it, so that names are its own."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def base_identity(model: nn.Module, trained: Collection[str]) -> tuple[str, str]:
    """Return two digests of all tensors but the trained ones: of their layout, and of their values.

    The original of a head of which an adapter trains a copy is left out: it is new, and random, each time a model is loaded.
    """
    # Adapters whose values stand in the base weights withdraw them for whoever asks for the state.
    model.state_dict(keep_vars=True)
    layout, values = hashlib.sha256(), hashlib.sha256()
    unused = tuple(_unused(model))
    for name, tensor in sorted(lasting_tensors(model).items()):
        if name not in trained and not name.startswith(unused):
            layout.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
            values.update(digest(tensor, SAMPLED))
    return layout.hexdigest(), values.hexdigest()


def digest(tensor: Tensor, limit: int) -> bytes:
    """Return a digest of at most ``limit`` values of a tensor, spread evenly.

    Raises:
        ValueError: the tensor is on the meta device and has no values.
    """
    if tensor.is_meta:
        raise ValueError("a model on the meta device has no values; load its weights first")
    data = tensor.detach()
    if type(data) not in (
        Tensor,
        nn.Parameter,
    ):  # formats of other libraries, which need not know how to index
        return b""
    flat = data.reshape(-1)
    if flat.numel() > limit:
        places = torch.linspace(0, flat.numel() - 1, limit, dtype=torch.float64, device="cpu").long()
        flat = flat[places.to(flat.device)]
    return hashlib.sha256(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()).digest()


def _unused(model: nn.Module) -> Iterable[str]:
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield f"{path}.original_module." if path else "original_module."
