"""Which positions ReFT changes: never padding, the same with a cache as without, each sample by its own adapter."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from bottleneck_models import inputs_for, model_named
from inlay import (
    Average,
    BatchSplit,
    Parallel,
    PromptTuningConfig,
    ReftConfig,
    Split,
    get_peft_model,
    inject_adapter_in_model,
)
from test_reft import config, inputs, made
from tiny_models import tiny

WHERE = [(3, 0, False), (3, 2, False), (0, 2, False), (9, 3, True)]
"""Numbers of first and last positions, and whether they share an intervention; the last one has more than there are."""
each_where = pytest.mark.parametrize("where", WHERE, ids=str)


def at(where: tuple[int, int, bool]) -> ReftConfig:
    first, last, tied = where
    return config(prefix_positions=first, suffix_positions=last, tied_weights=tied)


def prompts(left: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :left], mask[1, : left // 2] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@each_where
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generating_with_a_cache_is_generating_without(
    name: str, where: tuple[int, int, bool], search: dict[str, Any]
) -> None:
    model = made(name, at(where))
    given = prompts() | {
        "do_sample": False,
        "max_new_tokens": 7,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    found = [model.generate(**given, **search, use_cache=cached) for cached in (True, False)]
    assert torch.equal(found[0].sequences, found[1].sequences)
    for a, b in zip(found[0].scores, found[1].scores, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@each_where
def test_padding_on_the_left_changes_nothing(where: tuple[int, int, bool]) -> None:
    model, given = made("llama", at(where)), prompts()
    together = model.generate(**given, do_sample=False, max_new_tokens=6)
    for row, mask in enumerate(given["attention_mask"].bool()):
        alone = model.generate(
            input_ids=given["input_ids"][row, mask][None], do_sample=False, max_new_tokens=6
        )
        assert (
            together[row, 6:].tolist()[: alone.shape[1] - int(mask.sum())]
            == alone[0, int(mask.sum()) :].tolist()
        )


@pytest.mark.parametrize("settings", [{"cache_implementation": "static"}, {"prefill_chunk_size": 2}], ids=str)
def test_other_caches(settings: dict[str, Any]) -> None:
    model, given = made("llama", at((3, 2, False))), prompts()
    if "cache_implementation" in settings:
        settings = settings | {"disable_compile": True}
    with model.disable_adapter():
        plain, chunked = (
            model.generate(**given, **how, do_sample=False, max_new_tokens=6) for how in ({}, settings)
        )
    if not torch.equal(plain, chunked):
        pytest.skip(
            f"transformers {transformers.__version__} itself generates something else with {settings}"
        )
    wanted = model.generate(**given, do_sample=False, max_new_tokens=6)
    assert torch.equal(model.generate(**given, **settings, do_sample=False, max_new_tokens=6), wanted)


def test_beside_virtual_tokens_they_are_the_first_positions() -> None:
    model, given = made("llama", at((3, 2, False))), prompts()
    model.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=2))
    model.base_model.set_adapter(["default", "prompt"])
    with torch.no_grad():
        model.prompt_encoder["prompt"].embedding.weight.normal_()
    given |= {"do_sample": False, "max_new_tokens": 6}
    found = [model.generate(**given, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_what_is_trained_is_what_generates(name: str) -> None:
    """The labels that count say where the prompt ends, so that the last positions are the same as in ``generate``."""
    model, given = made(name, at((1, 2, False))), prompts()
    out = model.generate(
        **given, do_sample=False, max_new_tokens=5, output_logits=True, return_dict_in_generate=True
    )
    whole = out.sequences
    if name == "t5":
        logits = model(**given, decoder_input_ids=whole[:, :-1], labels=whole[:, 1:].contiguous()).logits
    else:
        mask = torch.cat([given["attention_mask"], torch.ones(3, whole.shape[1] - 6, dtype=torch.long)], 1)
        labels = whole.clone()
        labels[:, :6] = -100
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=whole, attention_mask=mask, position_ids=places, labels=labels).logits[
            :, 5:-1
        ]
    torch.testing.assert_close(logits, torch.stack(out.logits, 1), rtol=0, atol=1e-4)


def test_step_by_step_with_a_cache_of_ones_own() -> None:
    model, given = made("gpt2", at((8, 2, False))), prompts(0)
    ids, mask = given["input_ids"], given["attention_mask"]
    wanted = model.generate(**given, do_sample=False, max_new_tokens=4)
    cache, new = None, ids
    for _ in range(4):
        out = model(input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache, new = out.past_key_values, out.logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    assert torch.equal(ids[:, : wanted.shape[1]], wanted)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_that_keeps_its_class_generates_with_a_cache(name: str) -> None:
    wrapped, base = made(name, at((3, 2, False))), tiny(name)
    inject_adapter_in_model(at((3, 2, False)), base)
    state = {k.removeprefix("base_model.model."): v for k, v in wrapped.state_dict().items() if ".reft_" in k}
    assert not base.load_state_dict(state, strict=False).unexpected_keys
    given = prompts() | {"do_sample": False, "max_new_tokens": 5}
    assert torch.equal(base.eval().generate(**given), wrapped.generate(**given))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_padding_is_never_changed(name: str, side: str) -> None:
    model, given = made(name, at((9, 3, False))), inputs(name, side)
    put_out: list[Any] = []
    first = next(model.base_model.layers())
    first.register_forward_hook(lambda module, args, output: put_out.append(output))
    with torch.no_grad():
        model(**given)
        with model.disable_adapter():
            model(**given)
    found, base = (output if isinstance(output, Tensor) else output[0] for output in put_out)
    real = given["attention_mask"].bool()
    assert torch.equal(found[~real], base[~real])
    assert not torch.isclose(found[real], base[real]).all(-1).any()


@pytest.mark.parametrize("name", ["roberta", "deberta", "gemma2", "qwen3", "neox", "bart", "opt", "distilbert", "modernbert", "albert", "bloom", "falcon", "mixtral", "phi3"])  # fmt: skip
def test_a_padded_row_is_the_row_alone(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model, given = get_peft_model(model_named(name), at((3, 2, False))).eval(), inputs_for(name)
    mask = torch.ones_like(given["input_ids"])
    mask[0, -2:] = 0
    short = {key: value[:1, :-2] if key == "input_ids" else value[:1] for key, value in given.items()}
    with torch.no_grad():
        found, alone = model(**given, attention_mask=mask)[0][:1], model(**short)[0]
    torch.testing.assert_close(found[:, : alone.shape[1]], alone, rtol=0, atol=2e-5)


def test_without_a_mask_every_position_is_one() -> None:
    model, given = made("bert"), inputs("bert")
    wanted = model(**given, attention_mask=torch.ones_like(given["input_ids"]))[0]
    torch.testing.assert_close(model(**given)[0], wanted)


def test_a_mask_that_does_not_tell_padding_is_refused() -> None:
    model, given = made("llama"), inputs("llama")
    causal = torch.zeros(3, 1, 6, 6)
    with pytest.raises(ValueError, match=r"\[3, 1, 6, 6\].*pass attention_mask"):
        model(**given, attention_mask=causal)
    with model.disable_adapter():
        model(**given, attention_mask=causal)
    with pytest.raises(RuntimeError, match="outside of the model around it"):
        model.base_model.model.model.layers[0](torch.zeros(1, 2, 16))


def test_what_a_failed_call_knew_is_forgotten() -> None:
    model, given = made("gpt2"), inputs("gpt2", "left")
    hook = model.base_model.model.transformer.h[1].base_layer.mlp.register_forward_hook(_fail)
    with pytest.raises(MemoryError):
        model(**given)
    hook.remove()
    with pytest.raises(RuntimeError, match="outside of the model around it"):
        model.base_model.model.transformer.h[0](torch.zeros(3, 6, 16))
    assert model(**given).logits.isfinite().all()


def _fail(*_: Any) -> None:
    raise MemoryError


def test_pytorchs_own_encoder() -> None:
    def built(settings: ReftConfig) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
            return get_peft_model(
                nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), settings
            ).eval()

    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, :2] = True
    model = built(config())
    with torch.no_grad():
        found = model(x, src_key_padding_mask=padding)
        short = model(x[:1, 2:])
        torch.testing.assert_close(found[0, 2:], short[0])
        layer = get_peft_model(
            nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)),
            config(target_modules=["0"]),
        )
        block = layer.base_model.model[0].eval()
        off = block.base_layer(x, src_key_padding_mask=padding)
        on = block(x, src_key_padding_mask=padding)
    assert (
        torch.equal(on[padding], off[padding])
        and not torch.isclose(on[~padding], off[~padding]).all(-1).any()
    )


# ---------------------------------------------------------------------- several adapters


def two(name: str) -> Any:
    model = made(name, at((2, 1, False)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model.add_adapter("other", at((1, 3, False)))
    return model.eval()


@pytest.mark.parametrize("name", ["bert_classifier", "gpt2", "t5"])
def test_each_sample_goes_through_its_own_adapter(name: str) -> None:
    model, given = two(name), inputs(name, "" if name == "t5" else "left")
    wanted = {}
    with torch.no_grad():
        for adapter in ("default", "other"):
            model.set_adapter(adapter)
            wanted[adapter] = model(**given)[0]
        with model.disable_adapter():
            wanted["__base__"] = model(**given)[0]
        route = ["other", "__base__", "default"]
        mixed = model(**given, adapter_names=route)[0]
    for row, adapter in enumerate(route):
        torch.testing.assert_close(mixed[row], wanted[adapter][row], rtol=0, atol=2e-6)


def test_a_mixed_batch_generates_as_each_alone() -> None:
    model, given = two("llama"), prompts()
    route = ["other", "__base__", "default"]
    settings = {"do_sample": False, "max_new_tokens": 5, "num_beams": 2}
    mixed = model.generate(**given, **settings, adapter_names=route)
    for row, adapter in enumerate(route):
        alone = model.generate(**given, **settings, adapter_names=[adapter] * 3)
        assert mixed[row].tolist() == alone[row].tolist()


def test_compositions_divide_positions_and_rows() -> None:
    model, given = two("gpt2"), inputs("gpt2", "left")

    def under(choice: Any) -> Tensor:
        model.base_model.set_adapter(choice)
        with torch.no_grad():
            return model(**given).logits  # type: ignore[no-any-return]

    one, other = under("default"), under("other")
    torch.testing.assert_close(
        under(BatchSplit("default", "other", batch_sizes=[1, 2])), torch.cat([one[:1], other[1:]])
    )
    torch.testing.assert_close(under(Parallel("default", "other")), torch.cat([one, other]))
    torch.testing.assert_close(under(Average("default", "other", weights=[1.0, 0.0])), one)
    assert under(["default", "other"]).isfinite().all()
    split = under(Split("default", "other", splits=[4, 2]))
    real = given["attention_mask"].bool()
    first = real.clone()
    first[:, 4:] = False
    torch.testing.assert_close(split[first], one[first])  # a causal model: what comes later does not matter


def test_threads_do_not_see_each_others_padding() -> None:
    model = made("gpt2")
    batches = [inputs("gpt2", side) for side in ("", "left", "right")]
    with torch.no_grad():
        wanted = [model(**given).logits for given in batches]
    faults: list[int] = []
    start = threading.Barrier(3)

    def work(number: int) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(20):
                if not torch.allclose(model(**batches[number]).logits, wanted[number], atol=1e-5):
                    faults.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_it_compiles_into_one_graph(name: str) -> None:
    model, given = made(name), inputs(name, "left")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given)[0], model(**given)[0], rtol=0, atol=1e-5)
