"""``PeftModel``: the surface that scripts written for Hugging Face PEFT use, around an ``AdaptedModel``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from . import hub
from .adapted_model import AdaptedModel
from .checkpoint import IncompatibleKeys, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from .config import HUB_ARGUMENTS, PeftConfig, TaskType
from .errors import AdapterFileError, PeftWarning
from .files import check_folder, write_tensors
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from .switch import BASE
from .targets import model_config
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

    heads: tuple[str, ...] = ()
    """Names of the head that a task of this class trains and saves whole."""

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
            from dataclasses import replace

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
        for name in names:
            tensors = get_peft_model_state_dict(self, state_dict, name, save_embedding_layers=save_embedding_layers)
            config = self._config_to_save(name)
            if path_initial_model_for_weight_conversion is not None:
                from .inits.conversion import to_plain_lora

                tensors, config = to_plain_lora(tensors, config, load_peft_weights(path_initial_model_for_weight_conversion))
            if not is_main_process:
                continue
            target = folder if name == "default" else folder / name
            target.mkdir(parents=True, exist_ok=True)
            write_tensors(target, tensors, safe_serialization)
            config.save_pretrained(target)
            hub.write_model_card(target, config)

    def _config_to_save(self, name: str) -> PeftConfig:
        from dataclasses import replace

        config = self.peft_config[name]
        base = self.get_base_model()
        changes: dict[str, Any] = {}
        if config.base_model_name_or_path is None:
            changes["base_model_name_or_path"] = getattr(base, "name_or_path", None) or model_config(base).get("_name_or_path") or None
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
        hub_kwargs = _hub_arguments(kwargs, ephemeral_gpu_offload)
        config = _load_config(model_id, config, is_trainable, hub_kwargs)
        tensors = load_peft_weights(model_id, key_mapping=key_mapping, **hub_kwargs)
        chosen = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, cls) if cls is PeftModel else cls
        peft_model = chosen(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        try:
            peft_model._load(tensors, adapter_name, model_id, low_cpu_mem_usage)
        except BaseException:
            peft_model.base_model.delete_adapter(adapter_name)
            peft_model.unload()
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
        hub_kwargs = _hub_arguments(kwargs, ephemeral_gpu_offload)
        tensors = load_peft_weights(model_id, torch_device, key_mapping, **hub_kwargs)
        new = adapter_name not in self.peft_config
        if new:
            config = _load_config(model_id, None, is_trainable, hub_kwargs)
            self.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)
        try:
            result = self._load(tensors, adapter_name, model_id, low_cpu_mem_usage)
        except BaseException:
            if new:
                self.delete_adapter(adapter_name)
            raise
        if new or is_trainable:
            self.base_model.set_requires_grad(adapter_name, requires_grad=is_trainable)
        return result

    def _load(self, tensors: dict[str, torch.Tensor], name: str, origin: Any, low_cpu_mem_usage: bool) -> IncompatibleKeys:
        expected = set(get_peft_model_state_dict(self, adapter_name=name, save_embedding_layers=False))
        missing, unexpected = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
        unexpected = [k for k in unexpected if not k.endswith((".base_layer.weight", "embed_tokens.weight", "lm_head.weight"))]
        if missing or unexpected:
            raise AdapterFileError(
                f"{origin} does not fit this model; nothing was loaded. It lacks {_some(missing)} and has {_some(unexpected)} that the model "
                "does not know: is it an adapter of another base model, or was another configuration passed?"
            )
        result = set_peft_model_state_dict(self, tensors, name, low_cpu_mem_usage=low_cpu_mem_usage)
        return result

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the README.md of the active adapter."""
        hub.write_model_card(Path(output_dir), self._config_to_save(self.active_adapter))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save to a temporary folder and upload it; see ``inlay.hub.push_folder``. Returns the commit's address."""
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
            with nullcontext():
                base.enable_input_require_grads()


class PeftModelForSequenceClassification(PeftModel):
    """A sequence classifier; its head is trained and saved."""

    heads = ("classifier", "score")


class PeftModelForTokenClassification(PeftModel):
    """A token classifier; its head is trained and saved."""

    heads = ("classifier", "score")


class PeftModelForQuestionAnswering(PeftModel):
    """An extractive question answerer; its head is trained and saved."""

    heads = ("qa_outputs",)


class PeftModelForCausalLM(PeftModel):
    """A causal language model."""


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model."""


class PeftModelForFeatureExtraction(PeftModel):
    """A model whose hidden states are used."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[Any, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Return a base model with a new adapter, in the class of the configuration's task.

    Args:
        model: the base model; it is changed in place.
        peft_config: what to add; it is copied, not changed.
        adapter_name: name of the adapter.
        mixed: accepted for compatibility; adapters of several methods can always be mixed.
        autocast_adapter_dtype: keep the adapter in float32 where the base is in half precision.
        revision: revision of the base model, recorded in the adapter's file.
        low_cpu_mem_usage: leave the adapter on the meta device until its values are loaded.

    Raises:
        ValueError: the configuration does not fit the model, or the model already is a ``PeftModel``.
    """
    from dataclasses import replace

    if isinstance(model, PeftModel):
        raise ValueError("the model already is a PeftModel; use model.add_adapter(name, config) for another adapter, or model.unload() first")
    name = getattr(model, "name_or_path", None) or model_config(model).get("_name_or_path") or None
    changes = {"base_model_name_or_path": name or peft_config.base_model_name_or_path, "revision": revision or peft_config.revision}
    config = replace(peft_config, **changes)
    cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    return cls(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Set an adapter into a model without wrapping the model, and return the model.

    Args:
        peft_config: what to add.
        model: the model; it is changed in place and keeps its class.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: leave the adapter on the meta device until its values are loaded.
        state_dict: a saved adapter's tensors: exactly the modules that it names are adapted. Its values are not loaded.

    Raises:
        ValueError: the configuration does not fit the model, which is then unchanged.
    """
    from dataclasses import replace

    if state_dict is not None:
        found = {key[: key.index(".lora_")] for key in state_dict if ".lora_" in key}
        peft_config = replace(cast("Any", peft_config), target_modules={f.removeprefix("base_model.model.") for f in found})
    adapted = AdaptedModel(model, peft_config, adapter_name, low_cpu_mem_usage)
    cast("Any", model).peft_config = adapted.peft_config
    return model


def _load_config(model_id: Any, config: PeftConfig | None, is_trainable: bool, hub_kwargs: dict[str, Any]) -> PeftConfig:
    from dataclasses import replace

    loaded = PeftConfig.from_pretrained(model_id, **hub_kwargs) if config is None else config
    return replace(loaded, inference_mode=not is_trainable)


def _hub_arguments(kwargs: dict[str, Any], ephemeral_gpu_offload: bool) -> dict[str, Any]:
    if ephemeral_gpu_offload:
        raise ValueError("ephemeral_gpu_offload=True is not implemented in Inlay; leave it at False")
    if unknown := sorted(kwargs.keys() - HUB_ARGUMENTS - {"subfolder"}):
        warnings.warn(f"arguments {unknown} are unknown and were ignored", PeftWarning, stacklevel=3)
    return {k: v for k, v in kwargs.items() if k in HUB_ARGUMENTS or k == "subfolder"}


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "nothing"
