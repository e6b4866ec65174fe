"""How names in memory and keys on disk relate, in PEFT's format. This is the only place that knows.

in memory   base_model.model.h.0.attn.lora_A.default.weight     on disk   base_model.model.h.0.attn.lora_A.weight
            base_model.model.head.modules_to_save.default.bias            base_model.model.head.bias
            base_model.model.l.lora_magnitude_vector.default.weight       base_model.model.l.lora_magnitude_vector
            prompt_encoder.default.embedding.weight                       prompt_embeddings
            prompt_encoder.default.gates.0.weight                         prefix_gates.0.weight
            (a prompt's) base_model.model.head.modules_to_save.default.bias          base_model.head.bias
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn

from ..adapted_model import AdaptedModel
from ..config import PeftConfig
from ..injection.targets import embedding_ends, model_config
from ..injection.walk import (
    Place,
    adapted_layers,
    adapted_outputs,
    path_in_files,
    places,
    unwrapped,
    wrappers,
)
from ..layers.extras import ModulesToSaveWrapper
from ..layers.layer import AdaptedLayer
from ..layers.output import AdaptedOutput
from ..method import Slot
from ..prompts.encoder import PromptModule

EMBEDDINGS = ("embed_tokens", "lm_head")
"""Names under which a targeted embedding is saved whole, as PEFT does."""
WHOLE_EMBEDDING = (".base_layer.weight", *(f"{name}.weight" for name in EMBEDDINGS))
"""Endings of the keys of such embeddings."""
PROMPT = "prompt_embeddings"
"""The key of a prompt: of its embedding, or of what its network computes."""


def prompt_network(model: nn.Module, name: str) -> PromptModule | None:
    """Return the network that computes an adapter's prompt, None where there is none."""
    base = getattr(model, "base_model", None)
    if not isinstance(base, AdaptedModel) or name not in base.prompts:
        return None
    encoder = base.prompts.encoder(name)
    return encoder if encoder.computes else None


def disk_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Return ``{name in memory: key on disk}`` for everything that is saved with an adapter.

    Raises:
        ValueError: there is no such adapter.
    """
    prefix, bare = bare_model(model)
    configs: dict[str, PeftConfig] = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"Adapter {adapter_name} not found. There are: {sorted(configs)}")
    keys: dict[str, str] = {}
    if configs[adapter_name].is_prompt_learning and prompt_network(model, adapter_name) is None:
        keys[f"prompt_encoder.{adapter_name}.embedding.weight"] = PROMPT
    keys |= _beside_prompt(model, adapter_name)
    for path, wrapper in wrappers(bare):
        if isinstance(wrapper, AdaptedLayer) and adapter_name in wrapper.slots:
            slot = wrapper.slots[adapter_name]
            # A twin's parameters are its owner's; PEFT repeats them where the method itself adapts both.
            repeated = slot.owner is not None and slot.config is not configs[adapter_name]
            for name in () if repeated else slot.saved():
                column, _, rest = name.partition(".")
                disk = slot.method.on_disk.get(name, name)
                keys[f"{prefix}{path}.{column}.{adapter_name}{f'.{rest}' if rest else ''}"] = (
                    f"{prefix}{path}.{disk}"
                )
        elif isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            start = "base_model." if configs[adapter_name].is_prompt_learning else prefix
            for name in wrapper.modules_to_save[adapter_name].state_dict():
                keys[f"{prefix}{path}.modules_to_save.{adapter_name}.{name}"] = f"{start}{path}.{name}"
    keys |= {name: name for name in _bias_names(prefix, bare, configs[adapter_name], adapter_name)}
    outputs = _outputs(model)
    return {memory: path_in_files(disk, outputs) for memory, disk in keys.items()}


def _beside_prompt(model: nn.Module, name: str) -> dict[str, str]:
    base = getattr(model, "base_model", None)
    if not isinstance(base, AdaptedModel) or name not in base.prompts:
        return {}
    return {f"prompt_encoder.{name}.{n}": key for n, key in base.prompts.encoder(name).saved_beside().items()}


def whole_embeddings(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return ``{name in memory: key on disk}`` for those of a model's tensors that may be embeddings saved whole."""
    outputs = _outputs(model)
    return {name: path_in_files(name, outputs) for name in names if name.endswith(WHOLE_EMBEDDING)}


def _outputs(model: nn.Module) -> list[str]:
    prefix, bare = bare_model(model)
    return [f"{prefix}{path}" for path in adapted_outputs(bare)]


def first_slot(model: nn.Module, adapter_name: str) -> Slot | None:
    """Return a slot of the adapter's own method, which knows the adapter as a whole."""
    config = cast("Any", model).peft_config[adapter_name]
    slots = (w.slots.get(adapter_name) for _, w in adapted_layers(bare_model(model)[1]))
    return next((slot for slot in slots if slot is not None and slot.config is config), None)


def shared_keys(slot: Slot | None) -> list[str]:
    """Return the keys on disk of what an adapter keeps once for all its layers."""
    names = () if slot is None else slot.method.shared_names(slot.config)
    return [f"base_model.{name}" for name in names]


def shared_tensors(slot: Slot | None) -> dict[str, Tensor]:
    keys = shared_keys(slot)
    return dict(zip(keys, slot.method.shared(slot.config), strict=True)) if slot and keys else {}


def twin_paths(model: nn.Module, adapter_name: str) -> list[str]:
    """Return the beginnings of keys under which PEFT repeats an adapter's tensors for a tied layer."""
    prefix, bare = bare_model(model)
    return [
        f"{prefix}{path}."
        for path, w in wrappers(bare)
        if isinstance(w, AdaptedLayer) and adapter_name in w.slots and w.slots[adapter_name].owner is not None
    ]


def bare_model(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the base model and the prefix that its parameters' names have in the given one."""
    base = getattr(model, "base_model", None)
    if isinstance(base, AdaptedModel) and base is not model:
        return "base_model.model.", base.model
    return ("model.", model.model) if isinstance(model, AdaptedModel) else ("", model)


def _bias_names(prefix: str, bare: nn.Module, config: PeftConfig, adapter_name: str) -> list[str]:
    mode = getattr(config, "bias", "none")
    slots = [slot for _, w in wrappers(bare) if isinstance(w, AdaptedLayer) for slot in w.slots.values()]
    own = {id(p) for slot in slots for p in slot.parameters().values()}
    names = [
        f"{prefix}{name}"
        for name, p in bare.named_parameters()
        if name.rsplit(".", 1)[-1] == "bias" and id(p) not in own
    ]
    if mode == "all":
        return [name for name in names if ".modules_to_save." not in name and ".original_module." not in name]
    if mode == config.bias_of_targets:
        layers = {
            f"{prefix}{path}"
            for path, w in wrappers(bare)
            if isinstance(w, AdaptedLayer) and adapter_name in w.slots
        }
        return [name for name in names if name.removesuffix(".base_layer.bias") in layers]
    return []


def embedding_keys(model: nn.Module, adapter_name: str, save: bool | Literal["auto"]) -> dict[str, str]:
    """Return ``{name in memory: key on disk}`` for embeddings that are saved whole.

    They are the adapted ones, or both where the vocabulary has another size.
    """
    prefix, bare = bare_model(model)
    if save is False:
        return {}
    whole = save is True or _vocabulary_resized(bare, cast("Any", model).peft_config[adapter_name])
    found = []
    for path, place in places(bare).items():
        wrapper = place.wrapper
        while isinstance(wrapper, AdaptedOutput):
            wrapper = wrapper.base_layer
        adapted = (
            isinstance(wrapper, AdaptedLayer)
            and adapter_name in wrapper.slots
            and wrapper.slots[adapter_name].method.saves_embedding
        )
        at_an_end = path.rsplit(".", 1)[-1] in EMBEDDINGS or _is_embedding(bare, place)
        if (adapted and path.rsplit(".", 1)[-1] in EMBEDDINGS) or (whole and at_an_end):
            found.append(f"{prefix}{place.real_path}{unwrapped(place.wrapper)[1]}.weight")
    outputs = _outputs(model)
    return {name: path_in_files(name, outputs) for name in found}


def _is_embedding(bare: nn.Module, place: Place) -> bool:
    return any(end is not None and unwrapped(end)[0] is place.module for end in embedding_ends(bare))


def _vocabulary_resized(bare: nn.Module, config: PeftConfig) -> bool:
    """Whether the model's vocabulary has another size than its base folder's configuration says. Never asks the network."""
    path = Path(config.base_model_name_or_path or "") / "config.json"
    if not config.base_model_name_or_path or not path.is_file():
        return False
    size = re.search(r'"vocab_size"\s*:\s*(\d+)', path.read_text(encoding="utf-8"))
    return size is not None and int(size.group(1)) != model_config(bare).get("vocab_size", int(size.group(1)))
