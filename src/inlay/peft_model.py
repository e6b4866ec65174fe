"""``PeftModel``: the surface that scripts written for Hugging Face PEFT use, around an ``AdaptedModel``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import nn

from .adapted_model import AdaptedModel
from .composition import Child, divides_rows
from .composition.choice import is_fusion
from .config import PeftConfig, TaskType
from .errors import PeftWarning
from .layers.sequence import going_on_from
from .prompts.generation import at_every_step, given_prompt, prepare_generation
from .prompts.inputs import active_prompt, prepare
from .saved_model import SavedModel
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from .switch import BASE
from .training.checkpointing import gradient_checkpointing_is_on, let_gradients_through_inputs
from .training.trainer import teach_trainer

TASK_OF_CLASS = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
}
"""The task of a model of transformers, by the end of its class's name."""


class PeftModel(SavedModel):
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
        warn_of_another_task(model, peft_config, self.heads)
        config = self._with_heads(peft_config)
        self.base_model = AdaptedModel(model, config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype)
        self.prompt_encoder = self.base_model.prompts.encoders
        cast("Any", model).peft_config = self.peft_config
        if gradient_checkpointing_is_on(model):
            let_gradients_through_inputs(model)
        teach_trainer(PeftModel)

    def _with_heads(self, config: Any) -> PeftConfig:
        if self.heads and hasattr(config, "modules_to_save"):
            names = list(config.modules_to_save or [])
            return cast(
                "PeftConfig",
                replace(config, modules_to_save=names + [h for h in self.heads if h not in names]),
            )
        return cast("PeftConfig", config)

    # ------------------------------------------------------------------ running

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the base model with the adapters that are on.

        In training, what a method asks for (AdaLoRA's orthogonality) is added to ``loss`` of the output. PEFT adds it in
        evaluation as well.

        Args:
            *args: what the base model takes.
            **kwargs: what the base model takes.
            adapter_names: one adapter for each sample of the batch, ``"__base__"`` for none.

        Raises:
            ValueError: ``adapter_names`` has another length than the batch, or names an adapter that is not loaded.
        """
        with self._routed(adapter_names, args, kwargs):
            args, kwargs = prepare(self.base_model.prompts, self.get_base_model(), args, kwargs)
            outputs = self.base_model(*args, **kwargs)
            if self.training and torch.is_grad_enabled() and self.base_model.penalised:
                self._add_penalty(outputs)
            return outputs

    def _add_penalty(self, outputs: Any) -> None:
        loss = getattr(outputs, "loss", None)
        if isinstance(outputs, dict):
            loss = outputs.get("loss", loss)
        if not isinstance(loss, torch.Tensor):
            return
        penalty = self.base_model.penalty()
        penalised = loss + (penalty.to(loss.device) if isinstance(penalty, torch.Tensor) else penalty)
        if isinstance(outputs, dict):
            outputs["loss"] = penalised
        else:
            outputs.loss = penalised

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Generate with the base model's own ``generate``; ``adapter_names`` and ``Parallel`` as in ``forward``."""
        prompts, base = self.base_model.prompts, cast("Any", self.get_base_model())
        with self._routed(adapter_names, args, kwargs), at_every_step(prompts, base, kwargs) as repeated:
            args, kwargs = self.base_model.repeated_inputs(args, kwargs)
            if not repeated:
                args, kwargs = prepare_generation(prompts, base, args, kwargs)
            with going_on_from(base, lambda: given_prompt(prompts, base, args, kwargs, repeated)):
                return base.generate(*args, **kwargs)

    @contextmanager
    def _routed(
        self, names: Sequence[str] | None, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Iterator[None]:
        if names is None:
            yield
            return
        batch = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
        if batch is not None and len(batch) != len(names):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, "
                f"but got {len(names)} and {len(batch)} respectively."
            )
        if unknown := sorted({n for n in names if n != BASE and n not in self.peft_config}):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        if (block := divides_rows(self.base_model.switch.now().composition)) is not None:
            raise ValueError(
                f"adapter_names cannot be used under {block!r}, which says itself which adapter a row goes through; "
                "call set_adapter with a name first"
            )
        if fusions := [n for n in names if n != BASE and is_fusion(self.peft_config[n])]:
            raise ValueError(f"adapter_names cannot name fusions, such as {fusions[0]!r}; use set_adapter")
        if self.training and torch.is_grad_enabled() and gradient_checkpointing_is_on(self.get_base_model()):
            raise ValueError(
                "adapter_names cannot be used while training with gradient checkpointing, which runs layers again later"
            )
        if any(layer.merged for layer in self.base_model.layers()):
            raise ValueError(
                "adapter_names cannot be used while adapters are merged; call unmerge_adapter() first"
            )
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
        return {
            name for c in self.peft_config.values() for name in getattr(c, "modules_to_save", None) or ()
        } or None

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Set another adapter into the model. It is not active until ``set_adapter``.

        Raises:
            ValueError: the name is taken or unusable, or the configuration does not fit; the model is then unchanged.
        """
        self.base_model.add_adapter(
            adapter_name, self._with_heads(peft_config), low_cpu_mem_usage, autocast_adapter_dtype
        )

    def set_adapter(
        self,
        adapter_name: Child | Sequence[Child],
        inference_mode: bool = False,
        skip_layers: Iterable[int] = (),
    ) -> None:
        """Make adapters or a composition of them active (and trainable, unless ``inference_mode``); see ``AdaptedModel``."""
        self.base_model.set_adapter(adapter_name, inference_mode, skip_layers)

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
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """Return the state of each adapted layer."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """Return the state of the model as a whole."""
        return get_model_status(self)

    def get_prompt(self, batch_size: int) -> Any:
        """Return what the active prompt adapter puts in front of a batch, as PEFT does.

        Returns:
            virtual tokens ``[batch, n, d]``, an expanded view; or, of prefix tuning, a transformers ``DynamicCache`` with the
            virtual keys and values ``[batch, heads, n, d]`` of each layer.

        Raises:
            ValueError: no prompt adapter is active.
        """
        return active_prompt(self.base_model.prompts, batch_size)

    # ------------------------------------------------------------------ gradient checkpointing

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Turn on the base model's gradient checkpointing, and let gradients reach adapters below frozen layers."""
        base: Any = self.get_base_model()
        name = "activation_checkpointing_enable"  # in transformers 5
        enable = getattr(base, name if hasattr(base, name) else "gradient_checkpointing_enable")
        enable(gradient_checkpointing_kwargs, **kwargs)
        let_gradients_through_inputs(base)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turn on gradient checkpointing by the name that transformers 5 gives it."""
        cast("Any", self.get_base_model()).activation_checkpointing_enable(*args, **kwargs)
        let_gradients_through_inputs(self.get_base_model())


def warn_of_another_task(model: nn.Module, config: PeftConfig, heads: Sequence[str]) -> None:
    """Warn where the task that a configuration names is not the model's: the model's head would not be trained.

    Args:
        model: the base model.
        config: the configuration.
        heads: names of the head that the task trains.
    """
    name, reason = type(model).__name__, ""
    if heads and not getattr(config, "modules_to_save", None):
        own = {path.rpartition(".")[2] for path, _ in model.named_modules()}
        if own.isdisjoint(heads):
            reason = f"it has no {' or '.join(heads)}, so no head is trained; name it in modules_to_save"
    elif not heads and config.task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM):
        fitting = next((task for end, task in TASK_OF_CLASS.items() if name.endswith(end)), None)
        if fitting is not None:
            reason = f"its head is not trained; with task_type={fitting.value!r} it is"
    if reason:
        warnings.warn(
            f"task_type={TaskType(config.task_type).value!r} does not fit {name}: {reason}",
            PeftWarning,
            stacklevel=3,
        )
