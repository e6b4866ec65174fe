"""Adapters of different families on one model: what is refused, what is left on, and what is loaded together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapterhub_goldens import Golden
from inlay import (
    AdapterFileError,
    Average,
    BatchSplit,
    BottleneckConfig,
    LoraConfig,
    Parallel,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    Stack,
    VeraConfig,
    get_peft_model,
)
from inlay.cli.main import main
from tiny_models import tiny, tiny_inputs

LORA = LoraConfig(r=2, target_modules=["c_attn"])
PREFIX = PrefixTuningConfig(num_virtual_tokens=2)
PROMPT = PromptTuningConfig(num_virtual_tokens=2)


def ids(batch: int = 4) -> Tensor:
    return torch.randint(3, 40, (batch, 6), generator=torch.Generator().manual_seed(0))


def model_with(**configs: Any) -> Any:
    (first, config), *others = configs.items()
    model = get_peft_model(tiny("gpt2"), copy.deepcopy(config), first)
    for name, other in others:
        model.add_adapter(name, copy.deepcopy(other))
    with torch.no_grad():
        for name in configs:
            for p in model.base_model.adapter_parameters(name):
                p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model.eval()


@pytest.mark.parametrize("prompt", [PREFIX, PROMPT], ids=["prefix", "prompt"])
def test_a_prompt_stands_beside_a_block_not_in_it(prompt: Any) -> None:
    model = model_with(x=prompt, a=LORA, b=LORA)
    model.set_adapter("x")
    before = model(ids()).logits
    for block in (
        Average("x", "a"),
        BatchSplit("x", "a", batch_sizes=[2, 2]),
        Stack("a", Parallel("x", "b")),
    ):
        with pytest.raises(ValueError, match=r"prompts \['x'\] act on the model's inputs"):
            model.set_adapter(block)
        assert torch.equal(model(ids()).logits, before)
    model.set_adapter(Stack("x", Parallel("a", "b")))
    both = model(ids()).logits
    model.set_adapter(["x", "b"])
    assert torch.allclose(both[4:], model(ids()).logits, atol=1e-5)


@pytest.mark.parametrize("prompt", [PREFIX, PROMPT], ids=["prefix", "prompt"])
@pytest.mark.parametrize("prompt_first", [True, False])
def test_a_prompt_beside_an_invertible_adapter(prompt: Any, prompt_first: bool) -> None:
    invertible = BottleneckConfig(reduction_factor=2, inv_adapter="nice")
    configs = {"x": prompt, "a": invertible} if prompt_first else {"a": invertible, "x": prompt}
    model, mask = model_with(**configs), torch.ones_like(ids())
    outputs = {}
    for names in ("x", "a", ["x", "a"], ["a", "x"]):
        model.set_adapter(names)
        outputs[str(names)] = model(ids()).logits[:, -6:]
        generated = [
            model.generate(
                input_ids=ids(), attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=cached
            )
            for cached in (True, False)
        ]
        assert torch.equal(*generated)
    together, *others = outputs.pop("['x', 'a']"), outputs.pop("['a', 'x']"), *outputs.values()
    assert torch.equal(together, others[0])
    assert all(not torch.allclose(together, other, atol=1e-2) for other in others[1:])
    with model.disable_adapter():
        assert torch.equal(model(ids()).logits, tiny("gpt2").eval()(ids()).logits)


def test_layers_cannot_be_skipped_by_a_prompt() -> None:
    model = model_with(x=PREFIX, a=LORA)
    with pytest.raises(ValueError, match=r"skip_layers .* the prompts \['x'\] do not"):
        model.set_adapter(["x", "a"], skip_layers=[0])


@pytest.mark.parametrize("prompt", [PREFIX, PROMPT], ids=["prefix", "prompt"])
def test_a_second_model_around_prompts_is_refused(prompt: Any) -> None:
    base = tiny("gpt2")
    expected = base(ids()).logits
    model = get_peft_model(base, prompt, "x")
    with pytest.raises(ValueError, match=r"carries the prompt adapters \['x'\] of another PeftModel"):
        get_peft_model(base, LORA)
    assert torch.equal(model.unload()(ids()).logits, expected)
    get_peft_model(base, LORA)


def test_deleting_one_of_two_with_skipped_layers() -> None:
    model = model_with(a=LORA, c=LoraConfig(r=2, target_modules=["c_attn"], layers_to_transform=[0]))
    model.set_adapter(["a", "c"], skip_layers=[1])
    model.delete_adapter("a")
    assert model.active_adapters == ["c"]
    assert model(ids()).logits.isfinite().all()


def test_deleting_an_adapter_that_is_off_trains_nothing() -> None:
    model = model_with(a=LORA, b=LORA)
    model.set_adapter("a", inference_mode=True)
    model.delete_adapter("b")
    assert not any(p.requires_grad for p in model.parameters())
    model.add_adapter("c", LORA)
    model.set_adapter(["a", "c"])
    model.delete_adapter("c")
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".a." not in n} == set()


def test_a_part_of_a_composition_that_is_on_cannot_be_deleted() -> None:
    model = model_with(a=LORA, b=LORA)
    model.set_adapter(Average("a", "b", weights=[0.1, 0.1]))
    before = model(ids()).logits
    with pytest.raises(ValueError, match=r"b takes part in Average\('a', 'b'"):
        model.delete_adapter("b")
    assert torch.equal(model(ids()).logits, before)


def test_parallel_leaves_positions_alone() -> None:
    model = model_with(a=LORA, b=LORA)
    model.set_adapter(Parallel("a", "b"))
    assert model(ids(), logits_to_keep=torch.tensor([0, 1, 2, 3])).logits.shape == (8, 4, 40)


@pytest.mark.parametrize("save", [True, False])
def test_vera_trains_after_inference_mode(save: bool, tmp_path: Path) -> None:
    config = VeraConfig(r=4, target_modules=["query"], save_projection=save)
    model = get_peft_model(tiny("bert").to(torch.bfloat16), config, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        tiny("bert").to(torch.bfloat16), tmp_path, is_trainable=True, low_cpu_mem_usage=True
    )
    for each in (model, again):
        with torch.inference_mode():
            each(**tiny_inputs("bert"))
        each.train()(**tiny_inputs("bert")).last_hidden_state.float().sum().backward()


def test_the_parts_of_a_union_are_loaded_and_refused_together(shared: Path) -> None:
    golden = Golden(shared / "goldens" / "adapterhub" / "bert" / "mam")
    folder, inputs = golden.folder / "checkpoint_bin", golden.inputs()
    given = {key: inputs[f"full.{key}"] for key in ("input_ids", "attention_mask")}
    wanted = golden.tensors("expected")["full.logits"]
    model = get_peft_model(golden.base(), LoraConfig(r=2, target_modules=["query"]), "lora").eval()
    model.load_adapter(folder, "mam")
    with torch.no_grad():
        for name in ("mam", "mam_bottleneck"):
            for p in model.base_model.adapter_parameters(name):
                p.zero_()
    model.load_adapter(folder, "mam")
    model.set_adapter(["mam", "mam_bottleneck"])
    assert torch.allclose(model(**given).logits, wanted, atol=5e-5)

    model = get_peft_model(golden.base(), BottleneckConfig(reduction_factor=4), "mam_bottleneck")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="one would be named 'mam_bottleneck'"):
        model.load_adapter(folder, "mam")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="leave key_mapping out"):
        model.load_adapter(folder, "other", key_mapping={"layer": "nonsense"})


def test_a_union_of_which_one_part_does_not_fit_changes_no_other(shared: Path) -> None:
    golden = Golden(shared / "goldens" / "adapterhub" / "bert" / "mam")
    folder = golden.folder / "checkpoint_bin"
    model = get_peft_model(golden.base(), LoraConfig(r=2, target_modules=["query"]), "lora")
    model.load_adapter(folder, "mam")
    model.delete_adapter("mam_bottleneck")
    model.add_adapter("mam_bottleneck", BottleneckConfig(bottleneck_size=5))
    with torch.no_grad():
        for p in model.base_model.adapter_parameters("mam"):
            p.zero_()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AdapterFileError):
        model.load_adapter(folder, "mam")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_converting_for_another_class_or_family_of_models(
    tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny("bert")
    tiny("bert_classifier").save_pretrained(tmp_path / "classifier")
    get_peft_model(base, BottleneckConfig(reduction_factor=4)).save_pretrained(tmp_path / "adapter")
    command = ["convert", str(tmp_path / "adapter"), "--model", str(tmp_path / "classifier"), "--output-dir"]
    assert main([*command, str(tmp_path / "out")]) == 0
    again = PeftModel.from_pretrained(tiny("bert"), tmp_path / "out")
    assert again.get_nb_trainable_parameters()[0] == 0

    mam = shared / "goldens" / "adapterhub" / "bert" / "mam" / "checkpoint_bin"
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    assert (
        main(["convert", str(mam), "--model", str(tmp_path / "gpt2"), "--output-dir", str(tmp_path / "no")])
        == 2
    )
    assert "is for a model of type 'bert'" in capsys.readouterr().err
    with pytest.raises(AdapterFileError):
        PeftModel.from_pretrained(tiny("gpt2"), mam)
