"""Vectors made by running AdapterHub's ``adapters``: which configuration of Inlay they are, and where their tensors go.

A case is a folder (see ``goldens/adapterhub/README.md`` beside the models): ``golden.json`` with the configuration,
``full_state_dict.safetensors`` with the adapter named "a", ``expected.safetensors`` and ``grads.safetensors``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn

from inlay import BottleneckConfig, PeftModel, get_peft_model, set_peft_model_state_dict

CLASSES = {"bert": tf.BertForMaskedLM, "gpt2": tf.GPT2LMHeadModel}
PLACES = {
    r"(.*)\.attention\.output\.adapters": r"\1.attention.output.dropout",  # BERT
    r"(.*\.layer\.\d+)\.output\.adapters": r"\1.output.dropout",
    r"(.*)\.attention_adapters\.adapters": r"\1.attn.resid_dropout",  # GPT-2
    r"(.*)\.output_adapters\.adapters": r"\1.mlp.dropout",
}
"""Where AdapterHub keeps the adapters of a block, and the module whose output they act on."""
PARTS = {
    r"adapter_down\.[01]\.(.*)": r"adapter_down.\1",
    r"scaling": "adapter_scaling",
    r"gate\.(.*)": r"adapter_gate.\1",
    r"(.*)\.b": r"\1.bias",
}
SAME_NAME = {
    "reduction_factor", "non_linearity", "original_ln_before", "original_ln_after", "ln_before", "ln_after", "init_weights",
    "scaling", "use_gating", "residual_before_ln", "adapter_residual_before_ln", "leave_out", "dropout", "phm_layer", "phm_dim",
    "factorized_phm_W", "shared_W_phm", "shared_phm_rule", "phm_c_init", "phm_init_range", "learn_phm",
    "hypercomplex_nonlinearity", "phm_rank", "phm_bias", "stochastic_depth", "inv_adapter", "inv_adapter_reduction_factor",
}  # fmt: skip
OTHER_NAME = {"mh_adapter", "output_adapter", "is_parallel"}
WITHOUT_EFFECT = {"init_weights_seed": None, "cross_adapter": False, "factorized_phm_rule": False}


@dataclass
class Golden:
    """One case: the vectors, and the base model that they were made with."""

    folder: Path

    @property
    def told(self) -> dict[str, Any]:
        """The fields of AdapterHub's configuration."""
        told: dict[str, Any] = json.loads((self.folder / "golden.json").read_text())["config"]
        return told

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one of the case's files."""
        return load_file(self.folder / f"{name}.safetensors")

    def inputs(self) -> dict[str, Tensor]:
        """Return the inputs of all cases of a model."""
        return load_file(self.folder.parent / "inputs.safetensors")

    def base(self) -> nn.Module:
        """Return the plain model."""
        folder, family = self.folder.parent / "base", self.folder.parent.name
        config = tf.AutoConfig.from_pretrained(folder)
        config._attn_implementation = "eager"
        model: nn.Module = CLASSES[family](config)
        lacking = model.load_state_dict(load_file(folder / "state_dict.safetensors"), strict=False)
        assert not lacking.unexpected_keys and all("position_ids" in k for k in lacking.missing_keys)
        return model

    def model(self) -> PeftModel:
        """Return the model with the case's adapter, named "a"."""
        model = get_peft_model(self.base(), config_of(self.told), adapter_name="a")
        state = in_inlays_names(self.tensors("full_state_dict"), model)
        result = set_peft_model_state_dict(model, state, adapter_name="a")
        assert not result.missing_keys and not result.unexpected_keys, result
        return model


def config_of(told: dict[str, Any]) -> BottleneckConfig:
    """Return Inlay's configuration for AdapterHub's fields."""
    rest = told.keys() - SAME_NAME - OTHER_NAME
    assert {name: told[name] for name in rest} == {name: WITHOUT_EFFECT[name] for name in rest}
    places = {(True, True): "both", (True, False): "attention", (False, True): "feedforward"}
    # AdapterHub draws the factors of PHM layers in its own way whatever the field says; the vectors have other values anyway.
    return BottleneckConfig(
        placement=places[told["mh_adapter"], told["output_adapter"]],
        parallel=told["is_parallel"],
        **{name: told[name] for name in SAME_NAME if name in told},
    )


def in_inlays_names(tensors: dict[str, Tensor], model: PeftModel) -> dict[str, Tensor]:
    """Return the tensors of the adapter "a" by the keys of Inlay's files, and nothing else."""
    first = next(name for name, _ in model.named_parameters() if ".adapter_down." in name).partition(
        ".adapter_down."
    )[0]
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.endswith(".shared_parameters.a.phm_rule"):
            found[f"{first}.adapter_rule"] = value
            continue
        shared = re.fullmatch(r".*\.shared_parameters\.a\.W_(down|up)_(left|right)", key)
        if shared:
            found[f"{first}.adapter_{shared[1]}.W_{shared[2]}"] = value
        split = re.fullmatch(r"(.*)\.a\.(.*)", key)
        if not split or not any(re.fullmatch(place, split[1]) for place in PLACES):
            continue
        norm_twice = (
            "adapter_down.0." in key and key.replace("adapter_down.0.", "adapter_norm_before.") in tensors
        )
        if not norm_twice:  # AdapterHub keeps ln_before under two names
            found[f"base_model.model.{_renamed(split[1], PLACES)}.{_part(split[2])}"] = value
    return found


def _part(name: str) -> str:
    name = _renamed(name, PARTS)
    if name.endswith(".b"):
        name = name.removesuffix(".b") + ".bias"
    return re.sub(r"(adapter_(?:down|up))\.phm_rule", r"\1_rule", name)


def _renamed(name: str, rules: dict[str, str]) -> str:
    rule = next((r for r in rules if re.fullmatch(r, name)), None)
    return name if rule is None else re.sub(f"^{rule}$", rules[rule], name)
