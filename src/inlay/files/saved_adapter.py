"""An adapter as it was found in a folder or on the hub, in PEFT's format or AdapterHub's, before it is part of a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapterhub.folder import is_adapterhub, locate_description, read_folder
from ..config import HUB_ARGUMENTS, PeftConfig
from ..errors import AdapterFileError, PeftWarning
from .checkpoint import IncompatibleKeys, load_peft_weights, set_peft_model_state_dict
from .disk_keys import PROMPT, WHOLE_EMBEDDING, disk_keys, first_slot, prompt_network, shared_keys, twin_paths
from .folder import read_state


@dataclass(frozen=True)
class Loading:
    """How adapters are to be loaded: what ``from_pretrained`` and ``load_adapter`` were told.

    Attributes:
        is_trainable: go on training them.
        device: read the tensors onto this device.
        autocast_adapter_dtype: keep them in float32 where the base is in half precision.
        low_cpu_mem_usage: do not initialise parameters that are about to be loaded.
        key_mapping: see ``load_peft_weights``.
        hub: where on the hub, or in which folder inside: revision, subfolder, token, ...
    """

    is_trainable: bool
    device: str | torch.device | None
    autocast_adapter_dtype: bool
    low_cpu_mem_usage: bool
    key_mapping: dict[str, str] | None
    hub: dict[str, Any]

    @classmethod
    def asked(cls, *, ephemeral_gpu_offload: bool, hub: dict[str, Any], **settings: Any) -> Loading:
        """Return what a user asked for; arguments that nobody knows are left out with a warning.

        Raises:
            ValueError: ``ephemeral_gpu_offload`` is asked for, which there is not.
        """
        if ephemeral_gpu_offload:
            raise ValueError("ephemeral_gpu_offload=True is not implemented in Inlay; leave it at False")
        if unknown := sorted(hub.keys() - HUB_ARGUMENTS - {"subfolder"}):
            warnings.warn(f"arguments {unknown} are unknown and were ignored", PeftWarning, stacklevel=3)
        return cls(hub={k: v for k, v in hub.items() if k not in unknown}, **settings)


@dataclass
class SavedAdapter:
    """An adapter as it was found: its configuration and its tensors by their keys on disk.

    Attributes:
        origin: where it was found, for messages.
        config: its configuration.
        tensors: by their keys in PEFT's format.
        hub: where on the hub, or in which folder inside: revision, subfolder, ...
        state: what its method remembers from training, where that is known already.
        others: adapters that the folder holds beside it, by what sets their names apart: the parts of an AdapterHub union.
        everywhere: whether it is a fusion that may hold tensors of layers on which no member sits, as AdapterHub's do.
    """

    origin: Any
    config: PeftConfig
    tensors: dict[str, Tensor]
    hub: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Tensor] | None = None
    others: dict[str, SavedAdapter] = field(default_factory=dict)
    everywhere: bool = False

    @classmethod
    def find(
        cls, model: nn.Module, origin: str | os.PathLike[str], config: PeftConfig | None, loading: Loading
    ) -> SavedAdapter:
        """Read an adapter.

        Args:
            model: the bare model.
            origin: the adapter's folder, or a repository on the hub.
            config: used instead of the saved configuration.
            loading: how it is to be loaded.

        Raises:
            ValueError: there is no adapter.
            AdapterFileError: it is truncated or not what it seems.
        """
        if config is None:
            values = PeftConfig.from_json_file(locate_description(origin, **loading.hub))
            if is_adapterhub(values):
                if loading.key_mapping:
                    raise ValueError(
                        f"{origin} is an adapter of AdapterHub's, whose keys Inlay maps by itself; leave key_mapping out"
                    )
                return cls._of_adapterhub(model, origin, values, loading)
            config = PeftConfig.from_peft_type(**values)
        tensors = load_peft_weights(origin, loading.device, loading.key_mapping, **loading.hub)
        config = replace(config, inference_mode=not loading.is_trainable)
        return cls(origin, config, tensors, loading.hub)

    @classmethod
    def _of_adapterhub(
        cls,
        model: nn.Module,
        origin: str | os.PathLike[str],
        description: dict[str, Any],
        loading: Loading,
    ) -> SavedAdapter:
        from ..adapterhub.load import FUSION, parts_of

        folder = read_folder(origin, description, loading.device, **loading.hub)
        parts = {
            kind: cls(
                origin,
                replace(part.config, inference_mode=not loading.is_trainable),
                part.tensors,
                state=part.state,
                everywhere=kind == FUSION,
            )
            for kind, part in parts_of(folder, model).items()
        }
        first = next(iter(parts))
        return replace(parts[first], others={kind: part for kind, part in parts.items() if kind != first})

    def remembered(self) -> dict[str, Tensor]:
        """Return what the adapter's method remembered when it was saved, empty where that was nothing."""
        return read_state(self.origin, **self.hub) if self.state is None else self.state

    def put_into(self, model: nn.Module, name: str, low_cpu_mem_usage: bool) -> IncompatibleKeys:
        """Set the tensors as an adapter's values, if and only if they are exactly what it needs.

        Raises:
            AdapterFileError: tensors are missing, unknown, or of another shape; nothing is changed then.
        """
        expected = {*disk_keys(model, name).values(), *shared_keys(first_slot(model, name))}
        tensors = dict(self.tensors)
        if prompt_network(model, name) is not None:  # which comes from a file of its own
            tensors.pop(PROMPT, None)
        missing = sorted(expected - tensors.keys())
        twins = tuple(twin_paths(model, name))
        unexpected = sorted(
            key
            for key in tensors.keys() - expected
            if not key.endswith(WHOLE_EMBEDDING) and not key.startswith(twins)
        )
        if missing or unexpected:
            raise AdapterFileError(
                f"{self.origin} does not fit this model; nothing was loaded. It lacks {_some(missing)} and has "
                f"{_some(unexpected)} "
                "that the model does not know: is it an adapter of another base model, or was another configuration passed?"
            )
        return set_peft_model_state_dict(model, tensors, name, low_cpu_mem_usage=low_cpu_mem_usage)


def _some(names: Sequence[str]) -> str:
    return (
        f"{len(names)} tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        if names
        else "nothing"
    )
