"""ReFT computes what its formula says, at the positions that it names and nowhere else, on models of every build."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inlay import LoraConfig, PeftModel, ReftConfig, get_peft_model
from inlay.layers.taps import taps_on
from inlay.methods.reft import orthonormal
from tiny_models import tiny, tiny_inputs

BLOCKS: dict[str, Callable[[Any], list[nn.Module]]] = {
    "bert_classifier": lambda m: list(m.bert.encoder.layer),
    "gpt2": lambda m: list(m.transformer.h),
    "llama": lambda m: list(m.model.layers),
    "t5": lambda m: [*m.encoder.block, *m.decoder.block],
    "vit": lambda m: [b for b in m.vit.modules() if type(b).__name__ == "ViTLayer"],
}
PRESETS = ["loreft", "noreft", "direft"]
each_preset = pytest.mark.parametrize("preset", PRESETS)
each_model = pytest.mark.parametrize("name", list(BLOCKS))


def config(preset: str = "loreft", **changes: Any) -> ReftConfig:
    return ReftConfig.preset(preset, **({"r": 2, "dropout": 0.0, "suffix_positions": 2} | changes))


def made(name: str, settings: ReftConfig | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny model with an adapter, the same one at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(tiny(name, dtype), settings or config()).eval()


def inputs(name: str, padded: str = "") -> dict[str, Tensor]:
    """Return inputs of a tiny model; row 0 lacks two tokens on the "left" or on the "right"."""
    given = tiny_inputs(name)
    if padded and "input_ids" in given:
        mask = torch.ones_like(given["input_ids"])
        mask[0, :2] = mask[0, :2] * (padded != "left")
        mask[0, -2:] = mask[0, -2:] * (padded != "right")
        given |= {"attention_mask": mask}
    return given


def by_hand(model: Any, base: Any, name: str, real: Tensor | None) -> Any:
    """Return the bare model with a hook on each block that does what the paper says, position by position."""
    state = {key: p.detach() for key, p in model.named_parameters() if ".reft_" in key}
    told = model.peft_config["default"]
    for number, block in enumerate(BLOCKS[name](base)):

        def intervene(module: nn.Module, args: Any, output: Any, number: int = number) -> Any:
            own = [v for k, v in state.items() if _number(k, name) == number]
            units = [own[i : i + 3] for i in range(0, len(own), 3)]
            h = (output[0] if isinstance(output, tuple) else output).clone()
            mask = (
                real if real is not None and h.shape[1] == real.shape[1] else torch.ones(h.shape[:2]).bool()
            )
            for row in range(len(h)):
                tokens = mask[row].nonzero().flatten().tolist()
                last = set(tokens[len(tokens) - told.suffix_positions :])
                for p in {*tokens[: told.prefix_positions], *last}:
                    w, b, r = units[1 if p in last else 0]
                    r = torch.linalg.qr(r.T)[0].T if told.orthogonality else r
                    if (
                        told.orthogonality
                    ):  # the sign of each direction does not matter to anything but W h + b
                        r = r * (r @ units[1 if p in last else 0][2].T).diagonal().sign()[:, None]
                    source = w @ h[row, p] + b
                    h[row, p] = (
                        h[row, p] + (source - r @ h[row, p] if told.subtract_projection else source) @ r
                    )
            return (h, *output[1:]) if isinstance(output, tuple) else h

        block.register_forward_hook(intervene)
    return base


def _number(key: str, name: str) -> int:
    place = next(int(part) for part in key.split(".") if part.isdigit())
    return place + (2 if name == "t5" and ".decoder." in key else 0)


@each_preset
@pytest.mark.parametrize(
    ("name", "padded"),
    [(n, "") for n in BLOCKS]
    + [(n, side) for n in ("bert_classifier", "gpt2", "llama") for side in ("left", "right")],
)
def test_it_is_the_formula_at_the_positions_that_it_names(name: str, padded: str, preset: str) -> None:
    model, given = made(name, config(preset)), inputs(name, padded)
    real = given["attention_mask"].bool() if padded else None
    with torch.no_grad():
        found, wanted = model(**given)[0], by_hand(model, tiny(name), name, real)(**given)[0]
        with model.disable_adapter():
            off = model(**given)[0]
        assert torch.equal(off, tiny(name)(**given)[0])
    assert (found - off).abs().max() > 1e-2
    seen = slice(None) if real is None or found.dim() < 3 else real
    torch.testing.assert_close(found[seen], wanted[seen], rtol=0, atol=2e-5)


@each_preset
def test_it_starts_as_the_identity_where_it_is_asked_to(preset: str) -> None:
    model, given = made("bert", config(preset, init_reft_weights="identity")), inputs("bert", "right")
    with torch.no_grad():
        assert torch.equal(model(**given)[0], tiny("bert")(**given)[0])
    model.train()
    model(**given)[0].square().sum().backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.requires_grad and "source" in key}
    assert all(g is not None and g.abs().max() > 0 for g in grads.values())


def test_the_rows_of_R_stay_orthonormal_and_count_what_they_are() -> None:
    model, given = made("gpt2"), inputs("gpt2")
    block = model.base_model.model.transformer.h[0]
    free = block.reft_prefix["default"].projection.weight
    assert free.shape == (2, 16)
    torch.testing.assert_close(
        orthonormal(free), free.detach(), rtol=0, atol=1e-6
    )  # an orthonormal R is its own
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1
    )
    for _ in range(5):
        optimizer.zero_grad()
        model.train()(**given, labels=given["input_ids"]).loss.backward()
        optimizer.step()
    r = orthonormal(free)
    torch.testing.assert_close(r @ r.T, torch.eye(2), rtol=0, atol=1e-6)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 2 * (2 * 16 + 2 + 2 * 16)  # blocks x units x (W, b, R)


@pytest.mark.parametrize("name", ["bert_classifier", "gpt2"])
def test_training_makes_the_loss_fall_and_reaches_every_number(name: str) -> None:
    model, given = made(name, config(suffix_positions=0)), inputs(name, "right")
    labels = {"labels": given["input_ids"] if name == "gpt2" else torch.tensor([0, 1, 2])}
    parameters = {key: p for key, p in model.train().named_parameters() if p.requires_grad}
    optimizer, losses = torch.optim.Adam(parameters.values(), lr=0.02), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(**given, **labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters.values())


@pytest.mark.parametrize("name", ["bert_classifier", "gpt2", "llama", "t5"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = made(name).train()
        given = inputs(name, "" if name == "t5" else "left")
        if checkpointing:
            model.gradient_checkpointing_enable()
        # Two passes before the gradients: what the first one knew of its padding must not be the second one's.
        other = inputs(name)
        (model(**given).logits.square().mean() + model(**other).logits.square().mean()).backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        unread = (
            name == "bert_classifier" and "layer.1.reft_suffix" in key
        )  # its head reads the first position
        assert grad is not None and bool(grad.abs().max() > 0) != unread, key
        torch.testing.assert_close(found[1][key], grad, msg=key)


def test_a_part_that_checkpointing_runs_again_is_refused() -> None:
    model = made("gpt2", config(target_modules=["mlp.c_proj"])).train()
    model(**inputs("gpt2", "left")).logits.sum().backward()  # without checkpointing it may be a part
    model.gradient_checkpointing_enable()
    out = model(**inputs("gpt2", "left")).logits.sum()
    # Blocks of transformers 4 take the mask along, which then tells too little.
    with pytest.raises((RuntimeError, ValueError), match=r"adapt whole blocks|cannot tell padding"):
        out.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(dtype: torch.dtype) -> None:
    exact, model, given = made("llama"), made("llama", dtype=dtype), inputs("llama", "left")
    model.load_state_dict({k: v for k, v in exact.state_dict().items() if ".reft_" in k}, strict=False)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    out = model(**given).logits
    assert out.dtype == dtype
    real = given["attention_mask"].bool()
    gap = (out.float() - exact(**given).logits)[real].abs().max()
    with exact.disable_adapter(), model.disable_adapter():
        own = (model(**given).logits.float() - exact(**given).logits)[real].abs().max()
    assert gap < 3 * own + 1e-2
    out.float().square().mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert exact(**given).logits.isfinite().all()


@each_model
def test_saved_is_reloaded(name: str, tmp_path: Path) -> None:
    model, given = made(name), inputs(name)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(name), tmp_path).eval()
    assert torch.equal(again(**given)[0], model(**given)[0])
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.zero_()
    assert torch.equal(copied(**given)[0], again(**given)[0])


def test_deleting_it_takes_every_hook_out() -> None:
    model = made("t5")
    assert any(taps_on(m) for m in model.modules())
    model.add_adapter("other", config())
    model.delete_adapter("default")
    assert any(taps_on(m) for m in model.modules())
    base = model.unload()
    assert not any(taps_on(m) for m in base.modules())


def test_layers_choose_blocks_and_patterns_choose_modules() -> None:
    def paths(model: Any) -> list[str]:
        return sorted({key.partition(".reft_")[0] for key in model.state_dict() if ".reft_" in key})

    assert paths(made("llama", config(layers=[2]))) == ["base_model.model.model.layers.2"]
    assert paths(made("llama", config(target_modules=["down_proj"], layers=[0, 1]))) == [
        f"base_model.model.model.layers.{n}.mlp.down_proj" for n in (0, 1)
    ]
    assert len(paths(made("t5"))) == 4


def test_a_plain_module() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    x = torch.randn(3, 4, 6)
    model = get_peft_model(net, ReftConfig(target_modules=["0"], prefix_positions=1, dropout=0.0))
    with torch.no_grad():
        found = model(x)
        with model.disable_adapter():
            off = model(x)
        assert torch.equal(found[:, 1:], off[:, 1:]) and not torch.isclose(found[:, 0], off[:, 0]).any()
        single = model(x[:, 0])  # rows of single positions: each is a first one
    torch.testing.assert_close(single, found[:, 0])


def test_beside_lora() -> None:
    model, given = made("llama"), inputs("llama", "left")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model.add_adapter("lora", LoraConfig(r=2, init_lora_weights=False))
    merged = made("llama")  # the same ReFT on a base that has the LoRA in its weights
    with torch.no_grad():
        alone = model(**given).logits
        model.base_model.set_adapter(["default", "lora"])
        both = model(**given).logits
        model.set_adapter("lora")
        for mine, theirs in zip(_projections(merged), _projections(model), strict=True):
            mine.weight += theirs.get_delta_weight("lora")
        torch.testing.assert_close(both, merged(**given).logits, rtol=0, atol=2e-5)
        model.set_adapter("default")
        assert torch.equal(model(**given).logits, alone)
    assert (both - alone).abs().max() > 1e-3


def _projections(model: Any) -> list[Any]:
    return [m for path, m in model.named_modules() if path.endswith((".q_proj", ".v_proj"))]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prefix_positions": 0}, "no position to change"),
        ({"prefix_positions": -1}, "prefix_positions=-1"),
        ({"r": 0}, "r=0"),
        ({"r": 1.5}, "r=1.5"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"non_linearity": "gleu"}, "did you mean 'gelu'"),
        ({"layers": "al"}, "layers='al'"),
        ({"layers": [-1]}, "layers=-1"),
        ({"init_reft_weights": "zero"}, "'random' or 'identity'"),
        ({"init_reft_weights": "identity", "non_linearity": "relu"}, "non_linearity='relu'"),
        ({"hidden_size": 0}, "hidden_size=0"),
    ],
)
def test_what_a_configuration_cannot_say(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReftConfig(**fields)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gpt2", {"r": 17}, "r=17 orthonormal directions"),
        ("gpt2", {"layers": [0, 5]}, r"layers=\[5\]"),
        ("gpt2", {"target_modules": ["c_porj"]}, "did you mean"),
    ],
)
def test_what_a_model_cannot_have(name: str, fields: dict[str, Any], message: str) -> None:
    base = tiny(name)
    before = list(base.state_dict())
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config(**fields))
    assert list(base.state_dict()) == before
    with pytest.raises(ValueError, match="did you mean 'loreft'"):
        ReftConfig.preset("lorefd")
    with pytest.raises(ValueError, match="batch_first=True"):
        get_peft_model(nn.TransformerEncoderLayer(8, 2, 12), config(target_modules=["linear1"]))
    with pytest.raises(ValueError, match="no block that could be told"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), config())
    assert made(name)(**inputs(name)).logits.isfinite().all()


def test_it_cannot_be_merged() -> None:
    model = made("gpt2")
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
