"""Saving a model's adapters and loading them again: the part of ``PeftModel`` that deals with files and the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from .config import PeftConfig
from .files import hub
from .files.checkpoint import IncompatibleKeys, get_peft_model_state_dict, load_peft_weights
from .files.folder import adapter_folder, check_folder, check_whole, write_state, write_tensors
from .files.fusions import with_members
from .files.loading import new_model, take_in
from .files.saved_adapter import Loading
from .files.setups import SavedSetup, find_saved_adapters, load_setup, model_with_setup
from .injection.targets import base_name
from .injection.walk import adapted_layers
from .method import Method

if TYPE_CHECKING:
    from .peft_model import PeftModel


class SavedModel(nn.Module):
    """A model that can write its adapters to a folder or to the hub and read them from there."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write each adapter in PEFT's format: "default" to the folder itself, others to a folder of their name inside it.

        Args:
            save_directory: the folder.
            safe_serialization: safetensors, or else a pickle of tensors.
            selected_adapters: names; all by default. A fusion's members are saved with it.
            save_embedding_layers: see ``get_peft_model_state_dict``.
            is_main_process: write only there.
            path_initial_model_for_weight_conversion: folder of the adapter as it was before training, to write an adapter whose
                initialisation changed the base weights (PiSSA, OLoRA) as a plain LoRA of twice the rank.
            state_dict: values gathered elsewhere, such as from several devices.
            **kwargs: ignored, as in PEFT.

        Raises:
            ValueError: the path is a file, an adapter is unknown, or tensors are spread over several devices and no
                ``state_dict`` is given. Nothing is written then.
        """
        model, folder = cast("PeftModel", self), check_folder(save_directory)
        names = list(model.peft_config) if selected_adapters is None else list(selected_adapters)
        if unknown := [name for name in names if name not in model.peft_config]:
            raise ValueError(
                f"You passed an invalid `selected_adapters` arguments, current supported adapter names are "
                f"{list(model.peft_config)} - got {unknown}."
            )
        names = with_members(names, model)
        states, beside = {}, {}
        for name in names:
            tensors = get_peft_model_state_dict(
                self, state_dict, name, save_embedding_layers=save_embedding_layers
            )
            states[name] = self._packed(name, tensors)
            beside[name] = model.base_model.remembered(name, state_dict)
            check_whole(states[name] | beside[name])
        if not is_main_process:
            return
        for name, tensors in states.items():
            config = self._config_to_save(name)
            if path_initial_model_for_weight_conversion is not None:
                from .inits.conversion import to_plain_lora

                tensors, config = to_plain_lora(
                    tensors, config, load_peft_weights(path_initial_model_for_weight_conversion)
                )
            target = adapter_folder(folder, name)
            target.mkdir(parents=True, exist_ok=True)
            write_tensors(target, tensors, safe_serialization)
            config.save_pretrained(target)
            write_state(target, beside[name])
            hub.write_model_card(target, config)

    def _packed(self, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Let an adapter's method have the last word on what its file holds of each layer."""
        model = cast("PeftModel", self)
        method = model.base_model.methods.get(name)
        if method is None or type(method).pack is Method.pack:
            return tensors
        for path, layer in adapted_layers(model.get_base_model()):
            slot = layer.slots.get(name)
            if slot is not None and slot.method is method:
                keys = {column: f"base_model.model.{path}.{column}" for column in slot.saved()}
                packed = method.pack(slot, {column: tensors[key] for column, key in keys.items()})
                tensors |= {keys[column]: tensor for column, tensor in packed.items()}
        return tensors

    def _config_to_save(self, name: str) -> PeftConfig:
        model = cast("PeftModel", self)
        config, base = model.peft_config[name], model.get_base_model()
        changes: dict[str, Any] = {}
        if config.base_model_name_or_path is None:
            changes["base_model_name_or_path"] = base_name(base)
        if config.task_type is None:
            changes["auto_mapping"] = {
                "base_model_class": type(base).__name__,
                "parent_library": type(base).__module__,
            }
        return replace(config, **changes)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load a saved adapter onto a base model; a fusion brings its members, which are beside it.

        A setup that AdapterHub saved is loaded whole and its composition is on; see ``inlay.files.setups`` for the names.

        Args:
            model: the base model; it is changed in place.
            model_id: the adapter's folder, or a repository on the hub.
            adapter_name: name to give it.
            is_trainable: go on training it; otherwise it is frozen.
            config: use this configuration instead of the saved one.
            autocast_adapter_dtype: keep the adapter in float32 where the base is in half precision.
            ephemeral_gpu_offload: not implemented; must be False.
            low_cpu_mem_usage: do not initialise parameters that are about to be loaded.
            key_mapping: see ``load_peft_weights``.
            **kwargs: revision, subfolder, token, cache_dir, ... for the hub.

        Raises:
            ValueError: there is no adapter at ``model_id``.
            AdapterFileError: it is truncated or does not fit the model, which is then unchanged.
        """
        chosen = cast("type[PeftModel]", cls)
        loading = Loading.asked(
            is_trainable=is_trainable,
            device=None,
            autocast_adapter_dtype=autocast_adapter_dtype,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            low_cpu_mem_usage=low_cpu_mem_usage,
            key_mapping=key_mapping,
            hub=kwargs,
        )
        saved = find_saved_adapters(model, model_id, config, loading)
        if isinstance(saved, SavedSetup):
            return model_with_setup(chosen, model, adapter_name, saved, loading)
        return new_model(chosen, model, adapter_name, saved, loading)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> IncompatibleKeys:
        """Load another saved adapter or setup, or new values for one that is there. Not active until ``set_adapter``.

        Arguments and errors are those of ``from_pretrained``.

        Returns:
            the keys that are missing or unexpected: none, since a file that does not fit is refused.
        """
        model = cast("PeftModel", self)
        loading = Loading.asked(
            is_trainable=is_trainable,
            device=torch_device,
            autocast_adapter_dtype=autocast_adapter_dtype,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            low_cpu_mem_usage=low_cpu_mem_usage,
            key_mapping=key_mapping,
            hub=kwargs,
        )
        saved = find_saved_adapters(model.get_base_model(), model_id, None, loading)
        if isinstance(saved, SavedSetup):
            load_setup(model, adapter_name, saved, loading)
            return IncompatibleKeys([], [])
        return take_in(model, adapter_name, saved, loading)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the README.md of the active adapter."""
        hub.write_model_card(Path(output_dir), self._config_to_save(cast("PeftModel", self).active_adapter))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save to a temporary folder and upload it; see ``inlay.files.hub.push``. Returns the commit's address."""
        return hub.push(cast("PeftModel", self), repo_id, **kwargs)
