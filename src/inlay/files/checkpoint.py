"""The tensors of an adapter, out of a model and into one, by their keys in PEFT's format (``disk_keys.py``)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..config import CONFIG_NAME
from ..errors import AdapterFileError
from ..injection.walk import unwrapped, wrappers
from ..layers.extras import ModulesToSaveWrapper
from ..layers.layer import AdaptedLayer
from ..layers.slots import BufferDict
from ..prompts.encoder import encoder_values
from .disk_keys import (
    PROMPT,
    bare_model,
    disk_keys,
    embedding_keys,
    first_slot,
    prompt_network,
    shared_keys,
    shared_tensors,
    whole_embeddings,
)
from .folder import read_tensors


class IncompatibleKeys(NamedTuple):
    """What did not fit when a state was loaded; names in memory and on disk."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """Return an adapter's tensors by their keys on disk.

    Args:
        model: a ``PeftModel``, or a model with injected adapters.
        state_dict: take the values from this state (for example one gathered from several devices), not from the model.
        adapter_name: which adapter.
        unwrap_compiled: look through ``torch.compile``.
        save_embedding_layers: add the input and output embeddings; "auto": where they are adapted, or have another size than
            the base model's configuration says (looked up in a local folder only).

    Raises:
        ValueError: there is no such adapter.
        AdapterFileError: ``state_dict`` lacks a tensor of the adapter.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    keys = disk_keys(model, adapter_name)
    for name, disk in embedding_keys(model, adapter_name, save_embedding_layers).items():
        keys.setdefault(name, disk)
    beside = shared_tensors(first_slot(model, adapter_name)) | _computed_prompt(
        model, adapter_name, state_dict
    )
    if state_dict is None:
        live = _tensors(model) | _before_merging(model)
        live |= {
            name: layer.inside.base() for name, layer in _holding(model) if name in keys and layer.inside
        }
        return {disk: live[memory].detach() for memory, disk in keys.items()} | beside
    if lacking := sorted(keys.keys() - state_dict.keys()):
        raise AdapterFileError(f"the given state_dict lacks {lacking} of adapter {adapter_name!r}")
    return {disk: state_dict[memory] for memory, disk in keys.items()} | beside


def _computed_prompt(
    model: nn.Module, name: str, state_dict: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Return what the network of a prompt adapter computes, under its key on disk; empty where there is no network."""
    network = prompt_network(model, name)
    if network is None:
        return {}
    return {PROMPT: network.saved(encoder_values(state_dict, name))}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> IncompatibleKeys:
    """Set an adapter's tensors from a state with keys as on disk. Nothing is changed if a shape does not fit.

    Args:
        model: a ``PeftModel``, or a model with injected adapters.
        peft_model_state_dict: the tensors.
        adapter_name: which adapter.
        ignore_mismatched_sizes: leave out tensors of another shape.
        low_cpu_mem_usage: put the given tensors themselves in place of parameters on the meta device.

    Returns:
        ``missing_keys`` of this adapter in the model and ``unexpected_keys`` of the state.

    Raises:
        ValueError: there is no such adapter.
        AdapterFileError: a tensor has another shape than its parameter, or a prompt is computed by a network.
    """
    if PROMPT in peft_model_state_dict and prompt_network(model, adapter_name) is not None:
        raise AdapterFileError(
            f"the prompt of adapter {adapter_name!r} is computed by a network, which the state does not hold; load the adapter's "
            "folder with load_adapter instead"
        )
    keys = disk_keys(model, adapter_name)
    first = first_slot(model, adapter_name)
    shared = {key: peft_model_state_dict.get(key) for key in shared_keys(first)}
    memory = {disk: name for name, disk in keys.items()}
    live = _tensors(model)
    base = {disk: name for name, disk in whole_embeddings(model, live).items()}
    wanted = {disk: memory.get(disk, base.get(disk)) for disk in peft_model_state_dict if disk not in shared}
    wrong = [
        (d, m) for d, m in wanted.items() if m is not None and live[m].shape != peft_model_state_dict[d].shape
    ]
    if wrong and not ignore_mismatched_sizes:
        lines = [
            f"{d}: {tuple(peft_model_state_dict[d].shape)} in the state, {tuple(live[m].shape)} in the model"
            for d, m in wrong
            if m
        ]
        raise AdapterFileError(
            "the state does not fit the model (size mismatch); nothing was loaded:\n  " + "\n  ".join(lines)
        )
    given = [tensor for tensor in shared.values() if tensor is not None]
    if first is not None and given and len(given) == len(shared):
        first.method.load_shared(first.config, given)
    fitting = {d: m for d, m in wanted.items() if m is not None and (d, m) not in wrong}
    for name, layer in _holding(model):
        if name in fitting.values() and layer.inside is not None:
            layer.inside.leave()
    with torch.no_grad():
        for disk, name in fitting.items():
            present, value = live[name], peft_model_state_dict[disk]
            if present.device.type != "meta":
                present.copy_(value)
            else:
                _replace(model, [n for n, t in live.items() if t is present], present, value)
    missing = [name for name, disk in keys.items() if disk not in fitting]
    missing += [key for key, tensor in shared.items() if tensor is None]
    return IncompatibleKeys(missing, [disk for disk, name in wanted.items() if name is None])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def _before_merging(model: nn.Module) -> dict[str, Tensor]:
    """Return the base parameters that merging replaced: an adapter is saved with the base it is for."""
    prefix, bare = bare_model(model)
    return {
        f"{prefix}{path}{unwrapped(w)[1]}.{key}": p
        for path, w in wrappers(bare)
        if isinstance(w, AdaptedLayer)
        for key, p in w.originals.items()
        if p is not None
    }


def _holding(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Yield the layers in whose base weight an adapter's values stand, with that weight's name."""
    prefix, bare = bare_model(model)
    for path, w in wrappers(bare):
        if isinstance(w, AdaptedLayer) and w.inside is not None and w.inside.entered:
            yield f"{prefix}{path}{unwrapped(w)[1]}.{w.kind.param}", w


def _replace(model: nn.Module, names: list[str], present: Tensor, value: Tensor) -> None:
    """Put a tensor in place of a parameter on the meta device, under every name that it has, on the device of its layer."""
    owner_path = names[0].rpartition(".")[0]
    found = (
        m for _, m in _ancestors(model, owner_path) if isinstance(m, (AdaptedLayer, ModulesToSaveWrapper))
    )
    layer = next(found, None)  # None: the parameter is a prompt's
    if isinstance(layer, AdaptedLayer):
        device = layer.kind.device
    else:
        device = value.device if layer is None else next(layer.original_module.parameters()).device
    new = value.to(device, present.dtype)
    if isinstance(present, nn.Parameter):
        new = nn.Parameter(new, requires_grad=present.requires_grad)
    for name in names:
        path, _, attribute = name.rpartition(".")
        owner: Any = model.get_submodule(path)
        if isinstance(owner, (nn.ParameterDict, BufferDict)):
            owner[attribute] = new
        else:
            setattr(owner, attribute, new)


def _ancestors(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """Return the modules on the way to a path, innermost first."""
    parts = path.split(".")
    return [(p, model.get_submodule(p)) for p in (".".join(parts[:n]) for n in range(len(parts), 0, -1))]


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: dict[str, str] | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """Return the tensors of a saved adapter by their keys on disk.

    Args:
        model_id: a folder, or a repository on the hub.
        device: where to put them; the CPU by default.
        key_mapping: {expression: replacement} for keys of models whose modules have been renamed since.
        **hub: revision, subfolder, token, cache_dir, ...

    Raises:
        ValueError: there is no adapter.
        AdapterFileError: the file cannot be read.
    """
    tensors = read_tensors(model_id, device, **hub)
    for pattern, replacement in (key_mapping or {}).items():
        tensors = {re.sub(pattern, replacement, key): value for key, value in tensors.items()}
    return tensors


__all__ = [
    "CONFIG_NAME",
    "IncompatibleKeys",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "set_peft_model_state_dict",
]
