"""What PEFT refuses is refused here with the same class of error (or one derived from it)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import inlay
from tiny_models import tiny, tiny_inputs


def configured(**settings: Any) -> Callable[[Any, Path], Any]:
    return lambda lib, tmp: lib.LoraConfig(**settings)


def applied(model: str = "llama", **settings: Any) -> Callable[[Any, Path], Any]:
    return lambda lib, tmp: lib.get_peft_model(tiny(model), lib.LoraConfig(**settings))


def asked(act: Callable[[Any, Any], Any]) -> Callable[[Any, Path], Any]:
    return lambda lib, tmp: act(
        lib.get_peft_model(tiny("llama"), lib.LoraConfig(r=2, task_type="CAUSAL_LM")).eval(), lib
    )


def grouped(lib: Any, tmp: Path) -> Any:
    return lib.get_peft_model(
        torch.nn.Sequential(torch.nn.Conv2d(6, 6, 2, groups=3)), lib.LoraConfig(r=4, target_modules=["0"])
    )


def untyped(lib: Any, tmp: Path) -> Any:
    return lib.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), lib.LoraConfig())


CASES: dict[str, Callable[[Any, Path], Any]] = {
    "rank_zero": applied(r=0),
    "rank_negative": applied(r=-3),
    "task": configured(task_type="CHAT"),
    "layers_pattern_alone": configured(target_modules=["q_proj"], layers_pattern="layers"),
    "layers_with_expression": configured(target_modules=".*q_proj", layers_to_transform=[1]),
    "pattern_with_expression": configured(target_modules=".*q_proj", layers_to_transform=[1], layers_pattern="layers"),
    "loftq_without_settings": configured(init_lora_weights="loftq"),
    "dora_with_lora_bias": configured(use_dora=True, lora_bias=True),
    "unknown_init": applied(init_lora_weights="unknown"),
    "unknown_field": configured(rank=3),
    "unknown_bias": applied(bias="unknown"),
    "no_such_module": applied(target_modules=["k_prok"]),
    "no_such_expression": applied(target_modules="k_prok"),
    "module_of_no_kind": applied(target_modules=["mlp"]),
    "no_such_parameter": applied(target_modules=[], target_parameters=["k_prok.weight"]),
    "nothing": applied(target_modules=[]),
    "no_defaults": untyped,
    "dropout_on_parameters": applied("mixtral", target_modules=[], target_parameters=["experts.down_proj"], lora_dropout=0.1),
    "lora_bias_on_parameters": applied("mixtral", target_modules=[], target_parameters=["experts.down_proj"], lora_bias=True),
    "lora_bias_on_embeddings": applied(target_modules=["embed_tokens"], lora_bias=True),
    "groups": grouped,
    "no_such_embedding": applied(trainable_token_indices={"embeddings": [1]}),
    "token_twice": lambda lib, tmp: lib.get_peft_model(tiny("llama"), lib.TrainableTokensConfig(token_indices=[1, 1])),
    "set_unknown": asked(lambda model, lib: model.set_adapter("unknown")),
    "delete_unknown": asked(lambda model, lib: model.delete_adapter("unknown")),
    "add_existing": asked(lambda model, lib: model.add_adapter("default", lib.LoraConfig())),
    "second_bias": lambda lib, tmp: lib.get_peft_model(tiny("llama"), lib.LoraConfig(bias="all")).add_adapter("b", lib.LoraConfig(bias="lora_only")),
    "save_unknown": lambda lib, tmp: asked(lambda model, lib: model.save_pretrained(tmp, selected_adapters=["unknown"]))(lib, tmp),
    "load_from_nowhere": lambda lib, tmp: lib.PeftModel.from_pretrained(tiny("llama"), str(tmp / "nowhere")),
    "load_from_an_empty_folder": lambda lib, tmp: lib.PeftModel.from_pretrained(tiny("llama"), str(tmp)),
    "config_from_an_empty_folder": lambda lib, tmp: lib.PeftConfig.from_pretrained(str(tmp)),
    "route_too_short": asked(lambda model, lib: model(**tiny_inputs("llama"), adapter_names=["default"])),
    "route_to_unknown": asked(lambda model, lib: model(**tiny_inputs("llama"), adapter_names=["default", "unknown", "default"])),
    "status_without_adapters": lambda lib, tmp: lib.get_layer_status(tiny("llama")),
    "auto_class_made_directly": lambda lib, tmp: lib.AutoPeftModelForCausalLM(),
    "replication_then_merge": lambda lib, tmp: lib.get_peft_model(tiny("llama"), lib.LoraConfig(layer_replication=[(0, 2), (1, 3)])).merge_and_unload(),
    "eva_rho": lambda lib, tmp: lib.EvaConfig(rho=0.5),
    "eva_tau": lambda lib, tmp: lib.EvaConfig(tau=2.0),
}  # fmt: skip
STRICTER = {
    "replication_then_merge": "PEFT's own guard never fires, and the result is wrong",
    "token_twice": "PEFT trains two rows of which one is lost",
}
"""What Inlay refuses although PEFT does not, on purpose."""


@pytest.mark.parametrize("case", CASES)
def test_the_same_class_of_error(case: str, tmp_path: Path) -> None:
    act = CASES[case]
    try:
        act(peft, tmp_path)
    except Exception as error:
        classes = [getattr(inlay, cls.__name__, cls) for cls in type(error).__mro__ if cls is not object]
        wanted = classes[0]
        assert case not in STRICTER
    else:
        assert case in STRICTER, "PEFT does not refuse this"
        wanted = ValueError
    with pytest.raises(wanted) as caught:
        act(inlay, tmp_path)
    assert str(caught.value).strip() and "\n" not in str(caught.value)


def test_one_adapter_of_several_may_train_biases() -> None:
    for first, second in (("none", "all"), ("all", "none"), ("none", "lora_only")):
        trained = []
        for library in (inlay, peft):
            model = library.get_peft_model(tiny("bert"), library.LoraConfig(bias=first))
            model.add_adapter("second", library.LoraConfig(bias=second))
            trained.append({name for name, p in model.named_parameters() if p.requires_grad})
        assert trained[0] == trained[1]
