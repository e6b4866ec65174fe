"""``PeftModel``: the surface that scripts written for Hugging Face PEFT use, around an ``AdaptedModel``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn

from . import hub
from .adapted_model import AdaptedModel
from .checkpoint import IncompatibleKeys, SavedAdapter, get_peft_model_state_dict, load_peft_weights
from .config import PeftConfig, TaskType
from .files import check_folder, write_tensors
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from .switch import BASE
from .targets import base_name
from .training.trainer import teach_trainer


class PeftModel(nn.Module):
    """A base model with adapters. Everything it does not know itself is looked up on the base model.

    Args:
        model: the base model; it is changed in place.
        peft_config: configuration of the first adapter.
        adapter_name: its name.
        autocast_adapter_dtype: keep adapters in float32 where the base is in half precision.
        low_cpu_mem_usage: leave the adapter on the meta device until its values are loaded.

    Raises:
        ValueError: the configuration does not fit the model, which is then unchanged.
    """

    heads: ClassVar[tuple[str, ...]] = ()
    """Names of the head that a task of this class trains and saves whole."""
    for_task: ClassVar[dict[Any, type[PeftModel]]] = {}
    """The class of each task."""

    def __init_subclass__(cls, task: TaskType | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if task is not None:
            PeftModel.for_task[task] = cls

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        config = self._with_heads(peft_config)
        self.base_model = AdaptedModel(model, config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype)
        cast("Any", model).peft_config = self.peft_config
        if getattr(model, "is_gradient_checkpointing", False):
            self._let_gradients_through_inputs()
        teach_trainer(PeftModel)

    def _with_heads(self, config: Any) -> PeftConfig:
        if self.heads and hasattr(config, "modules_to_save"):
            names = list(config.modules_to_save or [])
            return cast("PeftConfig", replace(config, modules_to_save=names + [h for h in self.heads if h not in names]))
        return cast("PeftConfig", config)

    # ------------------------------------------------------------------ running

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the base model with the adapters that are on.

        Args:
            *args, **kwargs: what the base model takes.
            adapter_names: one adapter for each sample of the batch, ``"__base__"`` for none.

        Raises:
            ValueError: ``adapter_names`` has another length than the batch, or names an adapter that is not loaded.
        """
        with self._routed(adapter_names, args, kwargs):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Generate with the base model's own ``generate``; ``adapter_names`` as in ``forward``."""
        with self._routed(adapter_names, args, kwargs):
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def _routed(self, names: Sequence[str] | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
        if names is None:
            yield
            return
        batch = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
        if batch is not None and len(batch) != len(names):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and {len(batch)} respectively."
            )
        if unknown := sorted({n for n in names if n != BASE and n not in self.peft_config}):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        if self.training and torch.is_grad_enabled() and getattr(self.get_base_model(), "is_gradient_checkpointing", False):
            raise ValueError("adapter_names cannot be used while training with gradient checkpointing, which runs layers again later")
        if any(layer.merged for layer in self.base_model.layers()):
            raise ValueError("adapter_names cannot be used while adapters are merged; call unmerge_adapter() first")
        with self.base_model.switch.within(route=tuple(names)):
            yield

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base model inside the ``with`` block, in this thread. Merged adapters are left out too."""
        self.base_model.warn_if_biases_are_trained()
        with self.base_model.switch.within(enabled=False):
            yield

    def get_base_model(self) -> nn.Module:
        """Return the base model, with its layers adapted as they are."""
        return self.base_model.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(super().__getattr__("base_model"), name)

    # ------------------------------------------------------------------ adapters

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configuration of each adapter."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that are on."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str:
        """Name of the adapter that is on; the first, if there are several."""
        return next(iter(self.active_adapters), "")

    @property
    def active_peft_config(self) -> PeftConfig:
        """The configuration of the active adapter."""
        return self.peft_config[self.active_adapter]

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that are trained and saved whole."""
        return {name for c in self.peft_config.values() for name in getattr(c, "modules_to_save", None) or ()} or None

    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False, autocast_adapter_dtype: bool = True
    ) -> None:
        """Set another adapter into the model. It is not active until ``set_adapter``.

        Raises:
            ValueError: the name is taken or unusable, or the configuration does not fit; the model is then unchanged.
        """
        self.base_model.add_adapter(adapter_name, self._with_heads(peft_config), low_cpu_mem_usage, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one or several adapters active (and trainable, unless ``inference_mode``)."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out; nothing of it stays behind."""
        self.base_model.delete_adapter(adapter_name)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trainable and of all parameters. 4-bit weights count as the numbers they stand for."""
        trainable = total = 0
        for p in self.parameters():
            count = p.numel()
            if type(p).__name__ == "Params4bit":
                count *= 2 * getattr(p, "element_size", lambda: 1)()
            total += count
            trainable += count if p.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters, of all, and their ratio in percent."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """Return the state of each adapted layer."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """Return the state of the model as a whole."""
        return get_model_status(self)

    # ------------------------------------------------------------------ files

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
            selected_adapters: names; all by default.
            save_embedding_layers: see ``get_peft_model_state_dict``.
            is_main_process: write only there.
            path_initial_model_for_weight_conversion: folder of the adapter as it was before training, to write an adapter whose
                initialisation changed the base weights (PiSSA, OLoRA) as a plain LoRA of twice the rank.
            state_dict: values gathered elsewhere, such as from several devices.
            **kwargs: ignored, as in PEFT.

        Raises:
            ValueError: the path is a file, or an adapter is unknown. Nothing is written then.
        """
        folder = check_folder(save_directory)
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        if unknown := [name for name in names if name not in self.peft_config]:
            raise ValueError(
                f"You passed an invalid `selected_adapters` arguments, current supported adapter names are {list(self.peft_config)} - got {unknown}."
            )
        states = {n: get_peft_model_state_dict(self, state_dict, n, save_embedding_layers=save_embedding_layers) for n in names}
        if not is_main_process:
            return
        for name, tensors in states.items():
            config = self._config_to_save(name)
            if path_initial_model_for_weight_conversion is not None:
                from .inits.conversion import to_plain_lora

                tensors, config = to_plain_lora(tensors, config, load_peft_weights(path_initial_model_for_weight_conversion))
            target = folder if name == "default" else folder / name
            target.mkdir(parents=True, exist_ok=True)
            write_tensors(target, tensors, safe_serialization)
            config.save_pretrained(target)
            hub.write_model_card(target, config)

    def _config_to_save(self, name: str) -> PeftConfig:
        config, base = self.peft_config[name], self.get_base_model()
        changes: dict[str, Any] = {}
        if config.base_model_name_or_path is None:
            changes["base_model_name_or_path"] = base_name(base)
        if config.task_type is None:
            changes["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
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
        """Load a saved adapter onto a base model.

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
        from . import tasks  # noqa: F401  (fills ``for_task``)

        saved = SavedAdapter.find(model_id, config, is_trainable, None, key_mapping, ephemeral_gpu_offload, kwargs)
        chosen = cls if cls is not PeftModel else cls.for_task.get(saved.config.task_type, cls)
        frozen = [p for p in model.parameters() if p.requires_grad]
        peft_model = chosen(model, saved.config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        try:
            saved.put_into(peft_model, adapter_name, low_cpu_mem_usage)
        except BaseException:
            peft_model.delete_adapter(adapter_name)
            peft_model.unload()
            for p in frozen:
                p.requires_grad_(True)
            raise
        peft_model.set_adapter(adapter_name, inference_mode=not is_trainable)
        peft_model.eval()
        return peft_model

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
        """Load another saved adapter, or new values for one that is there. It is not active until ``set_adapter``.

        Arguments and errors are those of ``from_pretrained``.

        Returns:
            the keys that are missing or unexpected: none, since a file that does not fit is refused.
        """
        saved = SavedAdapter.find(model_id, None, is_trainable, torch_device, key_mapping, ephemeral_gpu_offload, kwargs)
        new = adapter_name not in self.peft_config
        if new:
            self.add_adapter(adapter_name, saved.config, low_cpu_mem_usage, autocast_adapter_dtype)
        try:
            result = saved.put_into(self, adapter_name, low_cpu_mem_usage)
        except BaseException:
            if new:
                self.delete_adapter(adapter_name)
            raise
        if new or is_trainable:
            self.base_model.set_requires_grad(adapter_name, requires_grad=is_trainable)
        return result

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the README.md of the active adapter."""
        hub.write_model_card(Path(output_dir), self._config_to_save(self.active_adapter))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save to a temporary folder and upload it; see ``inlay.hub.push``. Returns the commit's address."""
        return hub.push(self, repo_id, **kwargs)

    # ------------------------------------------------------------------ gradient checkpointing

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turn on the base model's gradient checkpointing, and let gradients reach adapters below frozen layers."""
        self.get_base_model().gradient_checkpointing_enable(*args, **kwargs)  # type: ignore[operator]
        self._let_gradients_through_inputs()

    def _let_gradients_through_inputs(self) -> None:
        """Make the embeddings' outputs require gradients: a checkpointed block is only differentiated if its inputs do."""
        base: Any = self.get_base_model()
        if hasattr(base, "enable_input_require_grads"):
            base.enable_input_require_grads()
