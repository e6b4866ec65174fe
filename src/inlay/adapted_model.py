"""A model whose layers carry adapters: set in, switch, merge, take out. ``PeftModel`` is the surface around it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .composition import Child, Fuse
from .composition.choice import choose, fusions_of, unknown_adapter
from .composition.inputs import copies_for, repeated
from .config import PeftConfig
from .errors import PeftWarning
from .injection.inject import inject, remove, resolve, save_whole
from .injection.replication import replicate_layers
from .injection.walk import wrappers
from .input_method import InputMethod
from .kinds import Conv1D
from .layers.extras import ModulesToSaveWrapper, TrainableTokensWrapper
from .layers.layer import AdaptedLayer
from .merging import MergeableModel
from .method import Method, Slot, method_by_name
from .prompts.prompts import Prompts
from .switch import Switch


class AdaptedModel(MergeableModel):
    """A base model and its adapters; what PEFT calls a tuner (``LoraModel`` and its kin).

    Args:
        model: the base model; it is changed in place.
        peft_config: the configuration of the first adapter, or several by name.
        adapter_name: name of the first adapter.
        low_cpu_mem_usage: leave new parameters on the meta device, for values that are about to be loaded.
        autocast_adapter_dtype: keep new parameters in float32 where the base is in half precision.

    Raises:
        ValueError: an adapter's name or configuration does not fit the model, which is then unchanged.
    """

    prefix = "lora_"

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self._wrapped: list[nn.Module] | None = None  # the wrappers of the model, until they change
        self.methods: dict[str, Method] = {}  # of each adapter that sits on layers
        present = next((w for _, w in wrappers(model)), None)
        self.switch: Switch = Switch() if present is None else _switch_of(present)
        self.prompts = Prompts(self.switch)  # the adapters that act on the model's inputs
        carried: dict[str, PeftConfig] = getattr(model, "peft_config", {})
        if prompts := [name for name, config in carried.items() if config.is_prompt_learning]:
            raise ValueError(
                f"the model carries the prompt adapters {prompts} of another PeftModel; use its add_adapter for more, or "
                "call its unload() first"
            )
        self.peft_config: dict[str, PeftConfig] = dict(carried) if present is not None else {}
        self.methods = {name: next(self.own_slots(name)).method for name in self.peft_config}
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        for name, config in configs.items():
            self.add_adapter(name, config, low_cpu_mem_usage, autocast_adapter_dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base model with the adapters that are on; under ``Parallel``, on the batch once for each of them."""
        args, kwargs = self.repeated_inputs(args, kwargs)
        return self.model(*args, **kwargs)

    def repeated_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call's arguments as the composition that is on needs them."""
        setting = self.switch.now()
        if setting.composition is None or not setting.enabled:
            return args, kwargs
        return repeated(args, kwargs, copies_for(setting.composition))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(super().__getattr__("model"), name)

    # ------------------------------------------------------------------ adapters

    def add_adapter(
        self,
        name: str,
        config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Set another adapter into the model. The first one becomes active; later ones wait for ``set_adapter``."""
        _check_name(name, self.peft_config)
        _check_bias(config, self.peft_config)
        if ranges := getattr(config, "layer_replication", None):
            if self.peft_config:
                raise ValueError(
                    "layer_replication changes the base model, so only the first adapter may ask for it"
                )
            replicate_layers(self.model, ranges)
        config = resolve(self.model, config)
        trainable = [p for p in self.model.parameters() if p.requires_grad] if not self.peft_config else []
        for p in trainable:
            p.requires_grad_(False)
        try:
            self._wrapped = None
            self._set_in(name, config, not low_cpu_mem_usage, autocast_adapter_dtype)
        except BaseException:
            for p in trainable:
                p.requires_grad_(True)
            raise
        self.peft_config[name] = config
        if len(self.peft_config) == 1:
            self.set_adapter(name, inference_mode=config.inference_mode)
        else:
            self.set_requires_grad(name, requires_grad=False)

    def _set_in(self, name: str, config: Any, initialise: bool, full_precision: bool) -> None:
        method = method_by_name(config.method_name())()
        if isinstance(method, InputMethod):
            save_whole(self.model, config, name, self.switch)
            try:
                self.prompts.add(self.model, name, method, config, initialise, full_precision)
            except BaseException:
                remove(self.model, name)
                raise
            return
        slots = inject(
            self.model, config, name, self.switch, initialise=initialise, full_precision=full_precision
        )
        if hasattr(config, "fan_in_fan_out"):  # other readers of the file take the layout from it
            config.fan_in_fan_out = any(isinstance(slot.kind, Conv1D) for slot in slots)
        self.methods[name] = slots[0].method

    def set_adapter(
        self,
        adapter_name: Child | Sequence[Child],
        inference_mode: bool = False,
        skip_layers: Iterable[int] = (),
    ) -> None:
        """Make adapters active and, outside inference mode, trainable; freeze those that were.

        Args:
            adapter_name: an adapter, a block of ``inlay.composition``, or several in the order in which they act.
            inference_mode: leave them frozen.
            skip_layers: blocks of the model, counted from 0, in which no adapter acts (AdapterDrop).

        Raises:
            ValueError: there is no such adapter or block of the model, blocks are nested in a way that has no meaning, or more
                than single adapters in order is asked for while adapters are merged. Nothing is changed then.
        """
        skipped = (
            frozenset(skip_layers) if isinstance(skip_layers, Iterable) else frozenset([str(skip_layers)])
        )
        if not all(isinstance(i, int) for i in skipped):
            raise ValueError(
                f"skip_layers={skip_layers!r} must be numbers of blocks, such as [0, 1] or range(2)"
            )
        choice = choose(adapter_name, self.peft_config)
        self._check_skipped(skipped, choice.active)
        if choice.composition is not None or skipped:
            self._check_not_merged("a composition" if choice.composition is not None else "skip_layers")
        trained = [name for name in choice.active if name not in choice.frozen]
        for name in (*self.switch.setting.active, *choice.frozen):
            if name in self.peft_config and name not in trained:
                self.set_requires_grad(name, requires_grad=False)
        self.set_requires_grad(trained, requires_grad=not inference_mode)
        self.switch.change(active=choice.active, composition=choice.composition, skip_layers=skipped)

    def _check_skipped(self, skipped: frozenset[int], active: Sequence[str]) -> None:
        if not skipped:
            return
        if prompts := [name for name in active if name in self.prompts]:
            raise ValueError(
                f"skip_layers leaves out adapters that sit on layers; the prompts {prompts} do not, so leave it empty"
            )
        last = max((layer.block for layer in self.layers() if layer.block is not None), default=-1)
        if wrong := sorted(i for i in skipped if not 0 <= i <= last):
            raise ValueError(
                f"skip_layers={wrong} are no blocks with adapters"
                + (f"; the last one is {last}" if last >= 0 else ": none sits in a numbered block")
            )

    def _check_not_merged(self, what: str) -> None:
        if any(layer.merged_adapters for layer in self.layers()):
            raise ValueError(f"{what} needs the adapters beside the weights; call unmerge_adapter() first")

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make the parameters of adapters trainable or not, active or not."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        self._check_known(names)
        for name in names:
            for p in self.adapter_parameters(name):
                p.requires_grad_(requires_grad)

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield every parameter that is trained with an adapter."""
        if name in self.prompts:
            yield from self.prompts.parameters(name)
        for slot in self.slots(name):
            yield from slot.parameters().values()
        for module in self.saved_modules():
            if name in module.modules_to_save:
                yield from (p for p in module.modules_to_save[name].parameters() if p.is_floating_point())
        mode = getattr(self.peft_config[name], "bias", "none")
        if mode == "all":
            own = {
                id(p) for w in self.layers() for slot in w.slots.values() for p in slot.parameters().values()
            }
            yield from (
                p
                for path, p in self.model.named_parameters()
                if path.rsplit(".", 1)[-1] == "bias" and id(p) not in own
            )
        elif mode == self.peft_config[name].bias_of_targets:
            yield from (b for slot in self.slots(name) if isinstance(b := slot.bias(), nn.Parameter))

    def slots(self, name: str) -> Iterator[Slot]:
        """Yield an adapter's slots in the order of the model's modules."""
        for layer in self.layers():
            if name in layer.slots:
                yield layer.slots[name]

    def own_slots(self, name: str) -> Iterator[Slot]:
        """Yield the slots of an adapter's own method: without token rows, and without twins that have no parameters."""
        config = self.peft_config[name]
        yield from (slot for slot in self.slots(name) if slot.config is config and slot.owner is None)

    def layers(self) -> Iterator[AdaptedLayer]:
        """Yield the adapted layers in the order of the model's modules."""
        yield from (w for w in self._wrappers() if isinstance(w, AdaptedLayer))

    def saved_modules(self) -> Iterator[ModulesToSaveWrapper]:
        """Yield the wrappers of modules that are trained and saved whole."""
        yield from (w for w in self._wrappers() if isinstance(w, ModulesToSaveWrapper))

    def _wrappers(self) -> list[nn.Module]:
        if self._wrapped is None:
            self._wrapped = [w for _, w in wrappers(self.model)]
        return self._wrapped

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out; nothing of it stays behind.

        Raises:
            ValueError: there is no such adapter, it is merged into the base weights, or it takes part in a composition that is
                on or in a fusion. Nothing is changed then.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        if any(adapter_name in layer.merged_adapters for layer in self.layers()):
            raise ValueError(
                f"Adapter {adapter_name} is merged into the base weights; call unmerge_adapter() first"
            )
        if fusions := fusions_of(adapter_name, self.peft_config):
            raise ValueError(
                f"Adapter {adapter_name} is a member of the fusions {fusions}; delete them first"
            )
        tree = self.switch.setting.composition
        alone = isinstance(tree, Fuse) and tree.name == adapter_name
        if tree is not None and adapter_name in self.switch.setting.active and not alone:
            raise ValueError(
                f"Adapter {adapter_name} takes part in {tree!r}, which is on; call set_adapter with something else first"
            )
        frozen = not any(p.requires_grad for p in self.adapter_parameters(adapter_name))
        self.set_requires_grad(adapter_name, requires_grad=False)
        remove(self.model, adapter_name)
        self._wrapped = None
        del self.peft_config[adapter_name]
        if adapter_name in self.prompts:
            self.prompts.remove(adapter_name)
        else:
            del self.methods[adapter_name]
        self._go_on_without(adapter_name, alone, frozen)

    def _go_on_without(self, name: str, fused: bool, frozen: bool) -> None:
        """Leave on what was on beside an adapter that is gone; the first of all where that is nothing."""
        setting = self.switch.setting
        if name not in setting.active:
            return
        left = () if fused else tuple(n for n in setting.active if n != name)
        blocks = {layer.block for layer in self.layers()}
        self.switch.change(active=left, composition=None, skip_layers=setting.skip_layers & blocks)
        if not left and self.peft_config:
            self.set_adapter(next(iter(self.peft_config)), inference_mode=frozen)

    def _check_known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.peft_config:
                raise unknown_adapter(name, self.peft_config)

    # ------------------------------------------------------------------ on and off

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that are on."""
        return list(self.switch.now().active)

    @property
    def active_adapter(self) -> list[str]:
        """The same as ``active_adapters``, as in PEFT."""
        return self.active_adapters

    def enable_adapter_layers(self) -> None:
        """Turn the adapters on."""
        self.switch.change(enabled=True)

    def disable_adapter_layers(self) -> None:
        """Turn the adapters off, until ``enable_adapter_layers``."""
        self.warn_if_biases_are_trained()
        self.switch.change(enabled=False)

    def warn_if_biases_are_trained(self) -> None:
        """Warn that the base model is not what it was where its biases are trained in place."""
        for name in self.active_adapters:
            if (bias := getattr(self.peft_config.get(name), "bias", "none")) != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be {bias!r} does not produce the same output as "
                    "the base model would without adaption.",
                    PeftWarning,
                    stacklevel=3,
                )

    # ------------------------------------------------------------------ training

    @property
    def penalised(self) -> bool:
        """Whether an active adapter's method may add to the loss."""
        setting = self.switch.now()
        methods = (self.methods[n] for n in setting.active if n in self.methods)
        return setting.enabled and any(type(m).penalty is not Method.penalty for m in methods)

    def penalty(self) -> Tensor | float:
        """Return what the active adapters add to the training loss, 0-d; 0.0 where they add nothing.

        ``PeftModel.forward`` adds it to ``outputs.loss`` in training; a loop that computes the loss itself adds it there.
        """
        total: Tensor | float = 0.0
        active = self.switch.now().active if self.penalised else ()
        for name in (n for n in active if n in self.methods):
            term = self.methods[name].penalty(list(self.own_slots(name)))
            total = total if term is None else total + term
        return total

    def stepping_adapters(self) -> list[str]:
        """Return the active adapters that are trained and act after each optimizer step."""
        return [
            name
            for name in self.active_adapters
            if name in self.methods
            and self.methods[name].steps()
            and any(p.requires_grad for p in self.adapter_parameters(name))
        ]

    def update_and_allocate(self, global_step: int) -> None:
        """Let the active adapters act after an optimizer step, such as AdaLoRA's rank budget.

        Call it after ``optimizer.step()`` and before ``zero_grad()``, once per optimizer step.

        Args:
            global_step: number of optimizer steps before this one.

        Raises:
            ValueError: no active adapter that is trained needs it, or there are no gradients.
        """
        names = self.stepping_adapters()
        if not names:
            raise ValueError(
                f"none of the active adapters {self.active_adapters} is trained with a method that acts after optimizer "
                "steps, such as AdaLoRA; leave the call out"
            )
        for name in names:
            self.methods[name].step(list(self.own_slots(name)), global_step)

    def remembered(self, name: str, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return what an adapter needs beside its values so that its training can go on; empty where that is nothing.

        Args:
            name: the adapter.
            state_dict: the whole model's, gathered from several devices; the model's own by default.
        """
        if name in self.prompts:
            return self.prompts.state(name, state_dict)
        return self.methods[name].state(list(self.own_slots(name)))


def _switch_of(wrapper: nn.Module) -> Switch:
    switch = wrapper.token_adapter.switch if isinstance(wrapper, TrainableTokensWrapper) else wrapper.switch
    assert isinstance(switch, Switch)
    return switch


def _check_name(name: str, taken: dict[str, PeftConfig]) -> None:
    if name in taken:
        raise ValueError(f"Adapter with name {name!r} already exists.")
    if not name or "." in name or name[0] in "/\\" or hasattr(nn.ModuleDict, name) or name == "__base__":
        raise ValueError(
            f"{name!r} cannot be an adapter's name: it becomes part of parameter names and the name of a folder, which rules out "
            f"dots, a slash in front and {name!r}"
        )


def _check_bias(config: PeftConfig, present: dict[str, PeftConfig]) -> None:
    mode = getattr(config, "bias", "none")
    if mode not in (known := ("none", "all", config.bias_of_targets)):
        raise NotImplementedError(
            f"Requested bias: {mode}, is not implemented. Known: {', '.join(map(repr, known))}."
        )
    if mode != "none" and any(getattr(c, "bias", "none") != "none" for c in present.values()):
        raise ValueError(
            "only one adapter may train biases of the base model; set bias='none' for the others"
        )
