"""The files of an AdapterHub folder: its description and one of two files of tensors, and what their keys say."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import CONFIG_NAME
from ..errors import AdapterFileError
from ..files.folder import locate, read_file

SAFETENSORS, PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
FUSION_CONFIG = "adapter_fusion_config.json"
FUSION_SAFETENSORS, FUSION_PICKLE = "model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin"
HOLDERS = (
    "adapters", "loras", "prefix_tunings", "prefix_gates", "shared_parameters", "refts", "prompt_tunings", "invertible_adapters",
    "adapter_fusion_layer",
)  # fmt: skip
"""Names of the dictionaries in which AdapterHub's modules keep what belongs to an adapter."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        at: path of the module that holds the dictionary.
        holder: name of the dictionary.
        rest: the tensor's name behind the adapter's.
    """

    at: str
    holder: str
    rest: str
    tensor: Tensor


@dataclass(frozen=True)
class Folder:
    """A folder as it was found."""

    origin: str
    description: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def configs(self) -> list[dict[str, Any]]:
        """The configuration, or those of the parts of a union."""
        config = self.description["config"]
        return list(config["configs"]) if config.get("architecture") == "union" else [config]

    def entries(self) -> Iterator[Entry]:
        """Yield the tensors with what their keys say.

        Raises:
            AdapterFileError: a key is not of the adapter.
        """
        name = re.escape(str(self.description["name"]))
        pattern = re.compile(rf"(?:(?P<at>.*)\.)?(?P<holder>{'|'.join(HOLDERS)})\.{name}\.(?P<rest>.*)")
        for key, tensor in self.tensors.items():
            found = pattern.fullmatch(key)
            if found is None:
                raise AdapterFileError(
                    f"{self.origin}: {key!r} is no tensor of adapter {self.description['name']!r}"
                )
            yield Entry(found["at"] or "", found["holder"], found["rest"], tensor)


def is_adapterhub(values: Any) -> bool:
    """Whether the values of an adapter's description are AdapterHub's."""
    return isinstance(values, dict) and isinstance(values.get("config"), dict) and "model_class" in values


def is_fusion_there(description: Mapping[str, Any]) -> bool:
    """Whether a description of AdapterHub's is that of a fusion."""
    return "query_before_ln" in description["config"]


def locate_description(origin: str | os.PathLike[str], **hub: Any) -> Path:
    """Return the path of a folder's ``adapter_config.json``, or of an AdapterHub fusion's description.

    Raises:
        ValueError: there is neither.
    """
    try:
        return locate(origin, CONFIG_NAME, **hub)
    except ValueError:
        try:
            return locate(origin, FUSION_CONFIG, **hub)
        except ValueError:
            pass
        raise


def describe(origin: str | os.PathLike[str], **hub: Any) -> dict[str, Any] | None:
    """Return a folder's description if it is AdapterHub's, else None."""
    try:
        values = json.loads(locate_description(origin, **hub).read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return None
    return values if is_adapterhub(values) else None


def other_than(told: Mapping[str, Any], only: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that have another value than the only one that Inlay reads; a field that is left out has that."""
    return {name: told[name] for name, value in only.items() if told.get(name, value) != value}


def read_folder(
    origin: str | os.PathLike[str],
    description: Mapping[str, Any],
    device: str | torch.device | None = None,
    **hub: Any,
) -> Folder:
    """Read the tensors of a folder.

    Raises:
        AdapterFileError: there are none, or the file is truncated.
    """
    names = (FUSION_SAFETENSORS, FUSION_PICKLE) if is_fusion_there(description) else (SAFETENSORS, PICKLE)
    for name in names:
        try:
            path = locate(origin, name, **hub)
        except ValueError:
            continue
        return Folder(str(origin), description, read_file(path, device))
    raise AdapterFileError(f"{origin} holds neither {' nor '.join(names)}")
