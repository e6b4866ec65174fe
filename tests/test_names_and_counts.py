"""Names, shapes and counts on the shapes of two real models, built from their configurations on the meta device."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from inlay import LoraConfig, get_peft_model

ATTENTION = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
FEED_FORWARD = ["intermediate.dense", "output.dense"]
SIZES = {"intermediate.dense": (768, 3072), "output.dense": (3072, 768)}


def bert_base() -> torch.nn.Module:
    with torch.device("meta"):
        return tf.BertModel(tf.BertConfig())


def mt0_large(tied: bool) -> torch.nn.Module:
    config = tf.MT5Config(
        vocab_size=250112, d_model=1024, d_ff=2816, d_kv=64, num_heads=16, num_layers=24, num_decoder_layers=24, feed_forward_proj="gated-gelu"
    )  # fmt: skip
    with torch.device("meta"):
        model = tf.MT5ForConditionalGeneration(config)
    model.lm_head.weight = (
        model.shared.weight if tied else torch.nn.Parameter(torch.empty(250112, 1024, device="meta"))
    )
    return model


@pytest.mark.parametrize(
    ("targets", "layers", "line"),
    [
        (
            ["query", "value"],
            [ATTENTION[0], ATTENTION[2]],
            "trainable params: 294,912 || all params: 109,777,152 || trainable%: 0.2686",
        ),
        (
            ["query", "key", "value", "dense"],
            ATTENTION + FEED_FORWARD,
            "trainable params: 1,339,392 || all params: 110,821,632 || trainable%: 1.2086",
        ),
    ],
    ids=["query_value", "query_key_value_dense"],
)
def test_bert_base(
    targets: list[str], layers: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = get_peft_model(bert_base(), LoraConfig(r=8, target_modules=targets))
    model.print_trainable_parameters()
    assert capsys.readouterr().out == line + "\n"
    wanted = {}
    prefix = "base_model.model.encoder.layer"
    for path in [f"{prefix}.{n}.{layer}" for n in range(12) for layer in layers] + [
        "base_model.model.pooler.dense"
    ] * ("dense" in targets):
        columns, rows = next(
            (size for end, size in SIZES.items() if path.endswith(end) and "attention" not in path),
            (768, 768),
        )
        wanted[f"{path}.lora_A.default.weight"] = (8, columns)
        wanted[f"{path}.lora_B.default.weight"] = (rows, 8)
    assert {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad} == wanted
    names = [name for name, _ in model.named_parameters()]
    assert f"{prefix}.0.attention.self.query.base_layer.weight" in names
    assert f"{prefix}.0.attention.self.query.base_layer.bias" in names
    assert "base_model.model.embeddings.word_embeddings.weight" in names
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("tied", "line"),
    [
        (False, "trainable params: 2,359,296 || all params: 1,231,940,608 || trainable%: 0.1915"),
        (True, "trainable params: 2,359,296 || all params: 975,825,920 || trainable%: 0.2418"),
    ],
    ids=["untied", "tied"],
)
def test_mt0_large(tied: bool, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(mt0_large(tied), LoraConfig(r=8, task_type="SEQ_2_SEQ_LM"))
    model.print_trainable_parameters()
    assert capsys.readouterr().out == line + "\n"
    assert model.get_nb_trainable_parameters()[0] == 2_359_296
    ends = {
        name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad
    }
    assert ends == {"q", "v"}
