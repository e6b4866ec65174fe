"""What a user says about an adapter: the common fields of every method's configuration, and its JSON file."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from .errors import PeftWarning

CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = "0.21.2"  # the version of Hugging Face PEFT whose files these are

Config = TypeVar("Config", bound="PeftConfig")


class TaskType(str, Enum):
    """What the base model is for; it decides which head is trained and saved beside the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, Enum):
    """Names of the built-in methods. A method from elsewhere is known by the plain string it registered."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    SHIRA = "SHIRA"
    IA3 = "IA3"
    LN_TUNING = "LN_TUNING"
    BITFIT = "BITFIT"
    BOTTLENECK = "BOTTLENECK"
    REFT = "REFT"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    VERA = "VERA"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    FUSION = "FUSION"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"


@dataclass(kw_only=True)
class PeftConfig:
    """What every method is told.

    Fields that are tuples of names in PEFT's JSON (``target_modules`` and the like) may be given as any collection.

    Args:
        task_type: what the base model is for, a ``TaskType`` or its name.
        peft_type: name of the method; set by each method's own class.
        auto_mapping: class and library of the base model, recorded where ``task_type`` is None.
        peft_version: version of the file format, written to ``adapter_config.json``.
        base_model_name_or_path: folder or hub id of the base model.
        revision: revision of the base model on the hub.
        inference_mode: load frozen.

    Raises:
        ValueError: ``task_type`` is unknown, or a field that this version of Inlay does not implement is set.
    """

    not_implemented: ClassVar[Mapping[str, Any]] = {}
    """Fields kept for the file format, with the only value that is accepted."""
    bias_of_targets: ClassVar[str] = "lora_only"
    """The value of ``bias``, where there is one, that trains the biases of the adapted layers alone."""

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = FORMAT_VERSION
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        if self.task_type is not None:
            known = [t.value for t in TaskType]
            if self.task_type not in known:
                raise ValueError(
                    f"Invalid task type: {str(self.task_type)!r}. Must be one of the following task types: {', '.join(known)}."
                )
            self.task_type = TaskType(self.task_type)
        for name in ("target_modules", "exclude_modules"):
            if hasattr(self, name):
                setattr(self, name, name_set(getattr(self, name)))
        for name, only in self.not_implemented.items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"{type(self).__name__}.{name}={getattr(self, name)!r} is not implemented in Inlay; leave it at {only!r}"
                )

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method acts on the model's inputs instead of its layers."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Always False; asked for by scripts written for PEFT."""
        return False

    def method_name(self) -> str:
        """Return the key of this configuration's method in ``inlay.method.METHODS``."""
        if self.peft_type is None:
            raise ValueError(
                "peft_type is not set: use the configuration class of a method, for example LoraConfig"
            )
        return str(self.peft_type.value if isinstance(self.peft_type, Enum) else self.peft_type)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON knows: enums as strings, sets as sorted lists."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``adapter_config.json`` to a folder, atomically and with the same bytes each time.

        Raises:
            ValueError: the path is a file.
        """
        from .files.folder import check_folder, write_atomically

        folder = check_folder(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict() | {"inference_mode": True}, indent=2, sort_keys=True)
        write_atomically(folder / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def from_pretrained(
        cls: type[Config],
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Config:
        """Read ``adapter_config.json`` from a folder or a hub repository into the class of its method.

        Raises:
            ValueError: there is no such file, it is not JSON, or it names an unknown method.
        """
        from .files.folder import locate

        hub = {k: kwargs.pop(k) for k in list(kwargs) if k in HUB_ARGUMENTS}
        values = cls.from_json_file(
            locate(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **hub)
        )
        return cls.from_peft_type(**(values | kwargs))

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """Return the fields in a JSON file.

        Raises:
            ValueError: the file is not a JSON object.
        """
        try:
            values = json.loads(Path(path_json_file).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path_json_file} is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(
                f"{path_json_file} holds a {type(values).__name__}, not an object with an adapter's fields"
            )
        return values

    @classmethod
    def from_peft_type(cls: type[Config], **kwargs: Any) -> Config:
        """Build the configuration of the method that ``peft_type`` names (or of this class, without one)."""
        from .method import method_by_name

        name = kwargs.get("peft_type")
        target = (
            cls
            if name is None
            else cast("type[Config]", method_by_name(str(getattr(name, "value", name))).config)
        )
        known = {f.name for f in fields(target) if f.init}
        if unknown := {k: v for k, v in kwargs.items() if k not in known and v not in (None, False, [], {})}:
            warnings.warn(
                f"fields {sorted(unknown)} are unknown to {target.__name__} and were ignored; "
                "the file may come from a newer version",
                PeftWarning,
                stacklevel=2,
            )
        return target(**{k: v for k, v in kwargs.items() if k in known})


HUB_ARGUMENTS = frozenset(
    {"revision", "cache_dir", "token", "force_download", "local_files_only", "proxies", "repo_type"}
)
"""Arguments of ``from_pretrained`` that are meant for the hub, not for the configuration."""


def changed_fields(config: PeftConfig) -> dict[str, Any]:
    """Return the fields of a configuration that differ from their defaults."""
    changed = {}
    for f in fields(config):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if getattr(config, f.name) != default:
            changed[f.name] = getattr(config, f.name)
    return changed


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(v) for v in value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def name_set(value: Any) -> Any:
    """Return a collection of names as a set; leave strings (patterns) and None as they are."""
    return set(value) if isinstance(value, (list, tuple, set, frozenset)) else value


__all__ = ["CONFIG_NAME", "PeftConfig", "PeftType", "TaskType", "field"]
