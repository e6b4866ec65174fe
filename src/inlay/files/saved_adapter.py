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
        cls,
        model: nn.Module,
        origin: str | os.PathLike[str],
        config: PeftConfig | None,
        is_trainable: bool,
        device: str | torch.device | None,
        key_mapping: dict[str, str] | None,
        ephemeral_gpu_offload: bool,
        kwargs: dict[str, Any],
    ) -> SavedAdapter:
        """Read an adapter; ``model`` is the bare one, the other arguments are those of ``PeftModel.from_pretrained``."""
        if ephemeral_gpu_offload:
            raise ValueError("ephemeral_gpu_offload=True is not implemented in Inlay; leave it at False")
        if unknown := sorted(kwargs.keys() - HUB_ARGUMENTS - {"subfolder"}):
            warnings.warn(f"arguments {unknown} are unknown and were ignored", PeftWarning, stacklevel=4)
        hub = {k: v for k, v in kwargs.items() if k not in unknown}
        if config is None:
            values = PeftConfig.from_json_file(locate_description(origin, **hub))
            if is_adapterhub(values):
                if key_mapping:
                    raise ValueError(
                        f"{origin} is an adapter of AdapterHub's, whose keys Inlay maps by itself; leave key_mapping out"
                    )
                return cls._of_adapterhub(model, origin, values, is_trainable, device, hub)
            config = PeftConfig.from_peft_type(**values)
        tensors = load_peft_weights(origin, device, key_mapping, **hub)
        return cls(origin, replace(config, inference_mode=not is_trainable), tensors, hub)

    @classmethod
    def _of_adapterhub(
        cls,
        model: nn.Module,
        origin: str | os.PathLike[str],
        description: dict[str, Any],
        is_trainable: bool,
        device: str | torch.device | None,
        hub: dict[str, Any],
    ) -> SavedAdapter:
        from ..adapterhub.load import FUSION, parts_of

        parts = {
            kind: cls(
                origin,
                replace(part.config, inference_mode=not is_trainable),
                part.tensors,
                state=part.state,
                everywhere=kind == FUSION,
            )
            for kind, part in parts_of(read_folder(origin, description, device, **hub), model).items()
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
