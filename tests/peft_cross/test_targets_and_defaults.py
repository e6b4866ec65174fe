"""The same configuration means the same thing: defaults, signatures, which modules are adapted, and with which rank and scale."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any

import peft
import pytest

import inlay
from tiny_models import tiny

MODELS = ["bert", "gpt2", "llama", "t5", "vit", "whisper"]


def default_of(field: Any) -> Any:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    return value.value if isinstance(value, Enum) else value


@pytest.mark.parametrize(
    "name",
    [
        "LoraConfig",
        "TrainableTokensConfig",
        "PeftConfig",
        "LoftQConfig",
        "EvaConfig",
        "LoraRuntimeConfig",
        "LoHaConfig",
        "LoKrConfig",
        "OFTConfig",
        "VeraConfig",
    ],
)
def test_defaults_of_configurations(name: str) -> None:
    mine, theirs = (
        {f.name: default_of(f) for f in fields(getattr(library, name)) if f.init} for library in (inlay, peft)
    )
    for values in (mine, theirs):
        values.pop("peft_version", None)  # set by the field in one, by __post_init__ in the other
        values.pop("peft_type", None)
        if values.get("runtime_config") is not None:
            values["runtime_config"] = vars(values["runtime_config"])
    assert mine == theirs
    made = [getattr(library, name)() for library in (inlay, peft)]
    assert [getattr(config, "peft_version", None) for config in made] in (
        [None, None],
        [peft.__version__] * 2,
    )
    if name.endswith(("LoraConfig", "TokensConfig")):
        ours, wanted = (config.to_dict() for config in made)
        ours.pop("runtime_config", None), wanted.pop("runtime_config", None)
        assert ours == wanted


FUNCTIONS = [
    "get_peft_model", "inject_adapter_in_model", "get_peft_model_state_dict", "set_peft_model_state_dict", "load_peft_weights",
    "prepare_model_for_kbit_training", "get_layer_status", "get_model_status",
]  # fmt: skip
METHODS = [
    "__init__", "save_pretrained", "from_pretrained", "load_adapter", "add_adapter", "delete_adapter", "set_adapter", "disable_adapter",
    "get_base_model", "get_nb_trainable_parameters", "print_trainable_parameters", "get_layer_status", "get_model_status",
    "create_or_update_model_card", "forward", "generate",
]  # fmt: skip
TUNER = [
    "merge_adapter",
    "unmerge_adapter",
    "merge_and_unload",
    "unload",
    "set_adapter",
    "delete_adapter",
    "enable_adapter_layers",
    "disable_adapter_layers",
]
LAYER = ["merge", "unmerge", "set_adapter", "delete_adapter", "enable_adapters", "get_base_layer", "set_scale", "scale_layer", "unscale_layer", "get_delta_weight"]  # fmt: skip
SIGNATURES = [(name, getattr(inlay, name), getattr(peft, name)) for name in FUNCTIONS]
SIGNATURES += [
    (f"PeftModel.{name}", getattr(inlay.PeftModel, name), getattr(peft.PeftModel, name)) for name in METHODS
]
SIGNATURES += [
    (f"LoraModel.{name}", getattr(inlay.LoraModel, name), getattr(peft.LoraModel, name)) for name in TUNER
]
SIGNATURES += [
    (f"LoraLayer.{name}", getattr(inlay.LoraLayer, name), getattr(peft.tuners.lora.Linear, name))
    for name in LAYER
]
SIGNATURES += [
    ("AutoPeftModel.from_pretrained", inlay.AutoPeftModel.from_pretrained, peft.AutoPeftModel.from_pretrained)
]


@pytest.mark.parametrize(("mine", "theirs"), [s[1:] for s in SIGNATURES], ids=[s[0] for s in SIGNATURES])
def test_whoever_calls_peft_can_call_inlay(mine: Any, theirs: Any) -> None:
    """Every argument of PEFT has the same name, place and default here; more may follow."""
    fixed = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    ours = inspect.signature(mine).parameters
    for place, (name, wanted) in enumerate(inspect.signature(theirs).parameters.items()):
        if wanted.kind not in fixed:
            continue
        assert name in ours, f"{name} is missing"
        assert ours[name].default == wanted.default or wanted.default is inspect.Parameter.empty, name
        if wanted.kind is fixed[0] and ours[name].kind is fixed[0]:
            assert list(ours).index(name) == place, f"{name} is in another place"


def test_public_names_are_those_of_peft() -> None:
    own = {
        "AdaptedLayer", "AdaptedModel", "AdapterFileError", "InputMethod", "METHODS", "Method", "Slot", "__version__",
        "BitFitConfig", "MaskOverlap", "ShiraOverlap", "calibrate_shira", "shira_overlap",
        "draw_ranks", "rank_report", "write_rank_report", "RDropLoss", "rdrop_repeat",
        "FreezeReport", "TrainableParamsCheckpoint", "freeze_delta", "freeze_from_config", "freeze_modules",
        "BottleneckConfig", "ReftConfig", "Family", "Points", "register_family", "AdapterDropCallback", "FusionConfig",
        "Average", "BatchSplit", "Fuse", "Parallel", "Split", "Stack",
    }  # fmt: skip
    reachable = (
        set(dir(peft))
        | set(dir(peft.tuners))
        | set(dir(peft.utils))
        | set(dir(peft.tuners.lora))
        | set(dir(peft.tuners.tuners_utils))
    )
    reachable |= {"NoMatchingPeftModuleError", "PeftError", "PeftWarning"}
    strangers = {name for name in inlay.__all__ if name not in reachable | own}
    assert not strangers, "names that PEFT has not got must be named here"


SELECTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "names": {"target_modules": ["query", "q_proj", "q", "c_attn"]},
    "one_name": {"target_modules": ["v_proj"]},
    "endings": {"target_modules": ["attention.self.query", "self_attn.v_proj", "SelfAttention.k", "mlp.c_fc"]},
    "full_path": {"target_modules": ["model.layers.0.self_attn.q_proj", "encoder.layer.1.attention.self.value", "transformer.h.0.attn.c_attn"]},
    "expression": {"target_modules": r".*\.(0|1)\..*(query|q_proj|q|c_attn)"},
    "expression_of_one": {"target_modules": r".*1\.self_attn\.v_proj"},
    "all_linear": {"target_modules": "all-linear"},
    "all_linear_classifier": {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    "excluded_names": {"target_modules": "all-linear", "exclude_modules": ["query", "q_proj", "k", "c_proj"]},
    "excluded_expression": {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    "excluded_all": {"target_modules": ["query", "q_proj", "q", "c_attn"], "exclude_modules": ["query", "q_proj", "q", "c_attn"]},
    "one_layer": {"target_modules": ["query", "q_proj", "q", "c_attn"], "layers_to_transform": 1},
    "layers": {"target_modules": ["query", "v_proj", "v", "c_fc"], "layers_to_transform": [0, 5]},
    "layers_by_pattern": {"target_modules": ["query", "q_proj", "q", "c_fc"], "layers_to_transform": [1], "layers_pattern": ["layer", "layers", "block", "h"]},
    "layers_by_one_pattern": {"target_modules": ["query", "q_proj", "q", "c_fc"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "wrong_pattern": {"target_modules": ["query", "q_proj", "q", "c_fc"], "layers_to_transform": [1], "layers_pattern": ["floors"]},
    "no_such_layer": {"target_modules": ["query", "q_proj", "q", "c_fc"], "layers_to_transform": [77]},
    "nothing": {"target_modules": ["no_such_module"]},
    "empty_list": {"target_modules": []},
    "a_block": {"target_modules": ["layers", "block", "h"]},
    "ranks": {"target_modules": ["query", "value", "q_proj", "v_proj", "q", "v", "c_attn"], "rank_pattern": {"query": 3, "q": 5, r"1\..*v_proj": 2, "^q_proj": 7}},
    "alphas": {"target_modules": ["query", "value", "q_proj", "v_proj", "q", "v", "c_attn"], "alpha_pattern": {"value": 3, r".*0.*q_proj": 2, "c_attn": 9}},
    "parameters": {"target_parameters": ["q_proj.weight", "experts.down_proj"]},
    "parameters_and_modules": {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]},
    "saved": {"target_modules": ["query", "q_proj", "q", "c_attn"], "modules_to_save": ["pooler", "classifier", "lm_head", "proj_out"]},
}  # fmt: skip


def outcome(library: Any, model: str, settings: dict[str, Any]) -> Any:
    """Return the adapted layers with rank and scale, or the class of the error."""
    try:
        with warnings.catch_warnings():  # both warn where one of several names matches nothing
            warnings.simplefilter("ignore")
            adapted = library.get_peft_model(tiny(model), library.LoraConfig(**settings))
    except Exception as error:
        return type(error).__name__
    found = {}
    for path, module in adapted.named_modules():
        if isinstance(module, library.LoraLayer if library is inlay else peft.tuners.lora.LoraLayer):
            found[path] = (module.r["default"], module.scaling["default"])
    saved = sorted(path for path, m in adapted.named_modules() if type(m).__name__ == "ModulesToSaveWrapper")
    return found, saved


OTHERWISE = {
    ("llama", "parameters"): "q_proj by default and q_proj.weight by name are one adapter; PEFT raises",
}
"""Where Inlay decides otherwise, on purpose."""


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("model", MODELS)
def test_the_same_modules_are_adapted(model: str, selection: str) -> None:
    wanted = outcome(peft, model, SELECTIONS[selection])
    got = outcome(inlay, model, SELECTIONS[selection])
    if (model, selection) in OTHERWISE:
        assert got != wanted and isinstance(got, tuple)
        return
    if selection == "default" and wanted == "ValueError":
        return  # PEFT has no default for this model
    assert got == wanted


def test_default_targets_are_those_of_peft() -> None:
    from inlay.injection.targets import DEFAULT_TARGETS

    theirs = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for model, targets in theirs.items():
        assert model in DEFAULT_TARGETS, f"no default for {model}"
        mine = DEFAULT_TARGETS[model]
        assert mine == targets if isinstance(targets, str) else set(mine) == set(targets), model


def test_an_expression_is_matched_as_a_whole() -> None:
    for library in (inlay, peft):
        assert outcome(library, "llama", {"target_modules": "q_proj"}) == "NoMatchingPeftModuleError"
