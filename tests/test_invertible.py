"""Invertible adapters of MAD-X: the coupling behind the embeddings, its inverse at the head, and their life in a model."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F

from bottleneck_models import inputs_for, model_named, shake
from inlay import (
    Average,
    BatchSplit,
    BottleneckConfig,
    FusionConfig,
    LoraConfig,
    PeftModel,
    Stack,
    get_peft_model,
    get_peft_model_state_dict,
)
from inlay.adapterhub import write_adapterhub
from inlay.adapterhub.folder import describe, read_folder
from inlay.layers.output import AdaptedOutput
from inlay.layers.taps import taps_on
from tiny_models import VOCABULARY, output_of

SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 20, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
NAMES = ["bert_mlm", "gpt2", "llama", "llama_tied", "t5"]


def base(name: str) -> Any:
    if name != "bert_mlm":
        return model_named(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.BertForMaskedLM(tf.BertConfig(**SIZES))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def inputs(name: str, batch: int = 3) -> dict[str, Tensor]:
    return inputs_for({"bert_mlm": "bert", "llama_tied": "llama"}.get(name, name), batch)


def config(**changes: Any) -> BottleneckConfig:
    return BottleneckConfig(**({"reduction_factor": 4, "inv_adapter": "nice"} | changes))


def adapted(name: str, **changes: Any) -> PeftModel:
    return get_peft_model(base(name), config(**changes)).eval()


def is_clean(model: nn.Module) -> bool:
    return not any(taps_on(m) or isinstance(m, AdaptedOutput) for m in model.modules())


def explicit_half(state: dict[str, Tensor], name: str, x: Tensor, act: Any) -> Tensor:
    narrow = act(x @ state[f"{name}.0.weight"].T + state[f"{name}.0.bias"])
    return narrow @ state[f"{name}.2.weight"].T + state[f"{name}.2.bias"]


@pytest.mark.parametrize(("act", "function"), [("relu", F.relu), ("swish", F.silu)])
def test_logits_and_gradients_are_the_papers(act: str, function: Any) -> None:
    plain = base("bert_mlm").double()
    model = get_peft_model(base("bert_mlm").double(), config(leave_out=[0, 1], non_linearity=act)).eval()
    model.double()
    shake(model)
    trained = {
        n.split("invertible_")[1].replace(".default", ""): p
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    assert {n: tuple(p.shape) for n, p in trained.items()} == {
        f"{half}.{n}": shape for half in "FG" for n, shape in {"0.weight": (4, 8), "0.bias": (4,), "2.weight": (8, 4), "2.bias": (8,)}.items()
    }  # fmt: skip
    ids = inputs("bert_mlm")["input_ids"]
    state = {n: p.detach().clone().requires_grad_() for n, p in trained.items()}
    e = plain.bert.embeddings(ids)
    o1 = e[..., :8] + explicit_half(state, "F", e[..., 8:], function)
    o = torch.cat([o1, e[..., 8:] + explicit_half(state, "G", o1, function)], -1)
    t = plain.cls.predictions.transform(plain.bert.encoder(o, None)[0])
    e2 = t[..., 8:] - explicit_half(state, "G", t[..., :8], function)
    back = torch.cat([t[..., :8] - explicit_half(state, "F", e2, function), e2], -1)
    wanted = plain.cls.predictions.decoder(back)
    got = model(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    got.square().sum().backward()
    wanted.square().sum().backward()
    for n, p in trained.items():
        assert state[n].grad.abs().max() > 0
        torch.testing.assert_close(p.grad, state[n].grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("names", [["default"], ["default", "b"], ["b", "default"]], ids=str)
def test_the_inverse_takes_back_what_was_done(names: list[str]) -> None:
    model = adapted("gpt2")
    model.add_adapter("b", config(inv_adapter_reduction_factor=4, non_linearity="gelu"))
    shake_each(model, ["default", "b"])
    model.double()
    model.base_model.set_adapter(names)
    drop, head, e = (
        model.base_model.model.transformer.drop,
        model.base_model.model.lm_head,
        torch.randn(2, 5, 16).double(),
    )
    o = drop(e)
    assert (o - e).abs().max() > 0.1
    torch.testing.assert_close(head(o), F.linear(e, head.weight), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(head(input=o), F.linear(e, head.weight), rtol=1e-11, atol=1e-11)
    if len(names) == 2:
        assert not torch.allclose(adapted_order(model, names[::-1], drop, e), o)


def adapted_order(model: PeftModel, names: list[str], layer: nn.Module, e: Tensor) -> Tensor:
    model.base_model.set_adapter(names)
    done: Tensor = layer(e)
    return done


def shake_each(model: PeftModel, names: list[str]) -> None:
    for seed, name in enumerate(names):
        model.set_adapter(name)
        shake(model, seed=seed)


@pytest.mark.parametrize("name", NAMES)
def test_life(name: str, tmp_path: Path) -> None:
    given, bare = inputs(name), base(name)
    with torch.no_grad():
        plain = output_of(bare, given)
        tied = bare.get_input_embeddings().weight is bare.get_output_embeddings().weight
        model = get_peft_model(bare, config()).eval()
        torch.testing.assert_close(output_of(model, given), plain, rtol=1e-6, atol=1e-6)
        shake(model)
        trained = output_of(model, given)
        assert (trained - plain).abs().max() > 1e-2
        with model.disable_adapter():
            assert torch.equal(output_of(model, given), plain)
        model.save_pretrained(tmp_path)
        for kwargs in ({}, {"low_cpu_mem_usage": True}):
            again = PeftModel.from_pretrained(base(name), tmp_path, **kwargs).eval()
            assert torch.equal(output_of(again, given), trained)
        twin = copy.deepcopy(model)
        shake(twin, seed=5)
        assert torch.equal(output_of(model, given), trained)
        assert not torch.equal(output_of(twin, given), trained)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(output_of(torch.load(buffer, weights_only=False), given), trained)
        assert all(status.enabled for status in model.get_layer_status())
        again.delete_adapter("default")
        assert torch.equal(output_of(again, given), plain) and is_clean(again)
        bare = model.unload()
        assert torch.equal(output_of(bare, given), plain) and is_clean(bare)
        assert tied == (bare.get_input_embeddings().weight is bare.get_output_embeddings().weight)
        assert [n for n, _ in bare.named_parameters()] == [n for n, _ in base(name).named_parameters()]


def test_keys_and_numbers() -> None:
    keys = [k for k in get_peft_model_state_dict(adapted("bert_mlm")) if "invertible" in k]
    assert keys == [f"base_model.model.bert.embeddings.invertible_{half}.{rest}" for half in "FG" for rest in ("0.weight", "0.bias", "2.weight", "2.bias")]  # fmt: skip
    t5 = [k for k in get_peft_model_state_dict(adapted("t5")) if "invertible" in k]
    assert len(t5) == 8 and all(k.startswith("base_model.model.shared.invertible_") for k in t5)
    with torch.device("meta"):
        model = get_peft_model(tf.BertModel(tf.BertConfig()), BottleneckConfig.preset("pfeiffer+inv"))
    assert model.get_nb_trainable_parameters()[0] == 1_190_592
    with torch.device("meta"):
        model = get_peft_model(tf.BertModel(tf.BertConfig()), BottleneckConfig.preset("double_seq_bn_inv"))
    assert model.get_nb_trainable_parameters()[0] == 2_085_120
    houlsby = BottleneckConfig.preset("houlsby+inv")
    assert (houlsby.inv_adapter, houlsby.non_linearity, houlsby.inv_adapter_reduction_factor) == (
        "nice",
        "swish",
        2,
    )


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama_tied", "t5"])
def test_generation_with_and_without_cache(name: str) -> None:
    model = adapted(name)
    shake(model)
    ids = inputs(name, 2)["input_ids"]
    settings: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 5,
        "do_sample": False,
    }
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    cached, uncached = (model.generate(**settings, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert (model.generate(**settings).logits[0] - cached.logits[0]).abs().max() > 1e-2


def three(name: str) -> PeftModel:
    model = adapted(name)
    model.add_adapter("b", config(non_linearity="gelu"))
    model.add_adapter("c", config(inv_adapter=None))
    shake_each(model, ["default", "b", "c"])
    return model


@pytest.mark.parametrize("name", ["bert_mlm", "llama", "t5"])
def test_each_sample_its_own_adapter(name: str) -> None:
    model, given, names = three(name), inputs(name, 5), ["b", "c", "default", "__base__", "b"]
    with torch.no_grad():
        mixed = output_of(model, given, adapter_names=names)
        model.set_adapter(BatchSplit("b", "c", "default", batch_sizes=[1, 1, 1]))
        split = output_of(model, {k: v[:3] for k, v in given.items()})
        for row, adapter in enumerate(names):
            model.set_adapter("b" if adapter == "__base__" else adapter)
            alone = {k: v[row : row + 1] for k, v in given.items()}
            if adapter == "__base__":
                with model.disable_adapter():
                    wanted = output_of(model, alone)
            else:
                wanted = output_of(model, alone)
            torch.testing.assert_close(mixed[row : row + 1], wanted, rtol=1e-4, atol=1e-4)
            if row < 3:
                torch.testing.assert_close(split[row : row + 1], wanted, rtol=1e-4, atol=1e-4)


def test_compositions() -> None:
    model, given = three("gpt2"), inputs("gpt2")
    with torch.no_grad():
        model.base_model.set_adapter(["default", "b", "c"])
        wanted = output_of(model, given)
        model.set_adapter(Stack("default", "b", "c"))
        torch.testing.assert_close(output_of(model, given), wanted)
        model.set_adapter(Average("default", "c"))
        with pytest.raises(ValueError, match="mixes invertible adapters"):
            output_of(model, given)
        before = list(model.state_dict())
        with pytest.raises(ValueError, match="fuse adapters without inv_adapter"):
            model.add_adapter("mix", FusionConfig(members=["default", "b"]))
        assert list(model.state_dict()) == before
        model.add_adapter("mix", FusionConfig(members=["default", "c"]))  # which meet in the blocks alone
        model.set_adapter("mix")
        assert output_of(model, given).isfinite().all()


@pytest.mark.parametrize("first", ["lora", "invertible"])
def test_beside_lora_on_embedding_and_head(first: str, tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=["embed_tokens", "lm_head"], r=2, init_lora_weights=False)
    pair = [("lora", lora), ("invertible", config())]
    model = None
    for name, c in pair if first == "lora" else pair[::-1]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(name))
            if model is None:
                model = get_peft_model(base("llama"), c, name).eval()
            else:
                model.add_adapter(name, c)
    assert model is not None
    model.set_adapter("invertible")
    shake(model)
    model.base_model.set_adapter(["lora", "invertible"])
    with torch.no_grad():
        wanted = output_of(model, inputs("llama"))
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base("llama"), tmp_path / "invertible", "invertible").eval()
        again.load_adapter(tmp_path / "lora", "lora")
        again.base_model.set_adapter(["lora", "invertible"])
        assert torch.equal(output_of(again, inputs("llama")), wanted)
    keys = {name: set(get_peft_model_state_dict(model, adapter_name=name)) for name in ("lora", "invertible")}
    assert not any("embed_tokens.weight" in k or "base_layer" in k for k in keys["invertible"])
    alone = get_peft_model(base("llama"), LoraConfig(target_modules=["embed_tokens", "lm_head"], r=2))
    assert keys["lora"] == set(get_peft_model_state_dict(alone))
    model.delete_adapter("invertible")
    assert not any(taps_on(m) for m in model.modules())


def test_a_head_that_is_saved_whole() -> None:
    model = adapted("llama", modules_to_save=["lm_head"])
    shake(model)
    with torch.no_grad():
        e = torch.randn(2, 5, 16)
        llama = model.base_model.model
        wanted = F.linear(e, llama.lm_head.weight)
        layer = llama.model.embed_tokens
        o = layer.slots["default"].method.after(layer.slots["default"], e, e)
        torch.testing.assert_close(llama.lm_head(o), wanted, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_replaced() -> None:
    model = adapted("gpt2")
    shake(model)
    with torch.no_grad():
        wanted = output_of(model, inputs("gpt2"))
        model.base_model.model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
        torch.testing.assert_close(output_of(model, inputs("gpt2"))[..., :VOCABULARY], wanted)


def test_a_module_around_the_head_cannot_be_saved_whole() -> None:
    plain = base("bert_mlm")
    with pytest.raises(ValueError, match=r"inside cls.*name cls\.predictions\.decoder itself"):
        get_peft_model(plain, config(modules_to_save=["cls"]))
    assert is_clean(plain)
    model = get_peft_model(plain, config())
    with pytest.raises(ValueError, match=r"at predictions\.decoder, an invertible adapter is undone"):
        model.add_adapter("b", LoraConfig(target_modules=["query"], modules_to_save=["cls"]))
    model = get_peft_model(base("bert_mlm"), LoraConfig(target_modules=["query"], modules_to_save=["cls"]))
    with pytest.raises(ValueError, match="which is inside cls"):
        model.add_adapter("b", config())


def test_half_precision_and_training() -> None:
    for name in ("bert_mlm", "t5"):
        model = get_peft_model(base(name).to(torch.bfloat16), config()).train()
        shake(model)
        model(**inputs(name)).logits.float().square().mean().backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
        assert {p.dtype for p in trained.values()} == {torch.float32}


@pytest.mark.parametrize("start", ["bert", "houlsby", "lora", "mam_adapter"])
def test_start(start: str) -> None:
    model = adapted("bert_mlm", init_weights=start)
    last = {n: p for n, p in model.named_parameters() if "invertible" in n and ".2.weight" in n}
    first = {n: p for n, p in model.named_parameters() if "invertible" in n and ".0.weight" in n}
    assert len(last) == len(first) == 2 and all(p.abs().max() > 0 for p in first.values())
    assert all((p.abs().max() > 0) == (start in ("bert", "houlsby")) for p in last.values())


@pytest.mark.parametrize("name", ["roberta", "deberta", "distilbert", "albert", "vit", "dinov2"])
def test_models_without_a_head_have_the_coupling_alone(name: str) -> None:
    model = get_peft_model(model_named(name), config(leave_out=[0] if name == "albert" else [0, 1])).eval()
    with torch.no_grad():
        plain = output_of(model, inputs_for(name))
        shake(model)
        assert (output_of(model, inputs_for(name)) - plain).abs().max() > 1e-2
    (slot,) = model.base_model.slots("default")
    assert slot.path.endswith("embeddings") and slot.layer.inverse is None


@pytest.mark.parametrize(
    ("name", "path"),
    [("neox", "emb_dropout"), ("bloom", "word_embeddings_layernorm"), ("opt", "embed_tokens")],
)
def test_where_embeddings_are_complete(name: str, path: str) -> None:
    slot = next(iter(adapted(name).base_model.slots("default")))
    assert slot.path.endswith(path) and slot.layer.inverse is not None


def test_refusals() -> None:
    for fields, message in [
        ({"inv_adapter": "glow"}, "'glow' is not implemented"),
        ({"inv_adapter": "fine"}, "'fine' is unknown"),
        ({"inv_adapter_reduction_factor": 2}, "without inv_adapter"),
        ({"inv_adapter": "nice", "inv_adapter_reduction_factor": 0}, "inv_adapter_reduction_factor=0"),
        ({"inv_adapter": "nice", "target_modules": ["x"]}, "use placement"),
    ]:
        with pytest.raises(ValueError, match=message):
            BottleneckConfig(**fields)
    for name in ("wav2vec2", "torch_last"):
        plain = model_named(name)
        with pytest.raises(ValueError, match="does not tell them"):
            get_peft_model(plain, config())
        assert is_clean(plain)
    odd = tf.BertModel(tf.BertConfig(**SIZES | {"hidden_size": 15, "num_attention_heads": 3}))
    with pytest.raises(ValueError, match="puts out 15 features"):
        get_peft_model(odd, config())
    assert is_clean(odd)


@pytest.mark.parametrize(("name", "top"), [("bert_mlm", "bert."), ("bert", ""), ("gpt2", "transformer.")])
def test_adapterhubs_folders(name: str, top: str, tmp_path: Path) -> None:
    model = get_peft_model(base(name), BottleneckConfig.preset("seq_bn_inv", reduction_factor=4)).eval()
    shake(model)
    saved = model.peft_config["default"]
    write_adapterhub(tmp_path, base(name), saved, get_peft_model_state_dict(model), "a")
    description = describe(tmp_path)
    assert description is not None and description["config"]["inv_adapter"] == "nice"
    keys = [k for k in read_folder(tmp_path, description).tensors if "invertible" in k]
    assert sorted(keys) == sorted(f"{top}invertible_adapters.a.{half}.{i}.{p}" for half in "FG" for i in (0, 2) for p in ("weight", "bias"))  # fmt: skip
    again = PeftModel.from_pretrained(base(name), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(output_of(again, inputs(name)), output_of(model, inputs(name)))


def test_adapterhubs_encoder_decoders_are_another_thing(tmp_path: Path) -> None:
    model = adapted("t5")
    with pytest.raises(ValueError, match="of an encoder alone"):
        write_adapterhub(
            tmp_path / "x", base("t5"), model.peft_config["default"], get_peft_model_state_dict(model), "a"
        )
    assert not (tmp_path / "x").exists()
