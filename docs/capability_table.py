"""Make the table "method x what it can do" of the README by trying each cell out.

python docs/capability_table.py            print the table
python docs/capability_table.py --write    put it into README.md
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay import (
    AdaLoraConfig,
    BitFitConfig,
    BottleneckConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ReftConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from inlay.method import METHODS as METHODS_BY_NAME

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- capabilities: made by docs/capability_table.py -->", "<!-- end of capabilities -->"


class Experts(nn.Module):
    """One matrix per expert, as mixture-of-experts models keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_of_experts = nn.Parameter(torch.randn(3, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,eoi->no", x, self.weight_of_experts)


class Attention(nn.MultiheadAttention):
    """Self-attention that returns its output alone."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


def gpt2_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(8, 6)


def layers() -> dict[str, tuple[Callable[[], nn.Module], Tensor]]:
    x = torch.randn(4, 6)
    return {
        "Linear": (lambda: nn.Linear(6, 8), x),
        "Conv1D (GPT-2)": (gpt2_conv1d, x),
        "Conv 1/2/3d": (lambda: nn.Conv2d(6, 8, 3), torch.randn(4, 6, 5, 5)),
        "grouped conv": (lambda: nn.Conv2d(6, 8, 3, groups=2), torch.randn(4, 6, 5, 5)),
        "Embedding": (lambda: nn.Embedding(9, 6), torch.randint(0, 9, (4, 3))),
        "norms": (lambda: nn.LayerNorm(6), x),
        "attention": (lambda: Attention(6, 2, batch_first=True), torch.randn(4, 3, 6)),
        "experts": (Experts, x),
    }


METHODS: dict[str, Callable[[dict[str, Any]], PeftConfig]] = {
    "LoRA, rsLoRA": lambda where: LoraConfig(r=2, **where),
    "DoRA": lambda where: LoraConfig(r=2, use_dora=True, **where),
    "LoHa": lambda where: LoHaConfig(r=2, **where),
    "LoKr": lambda where: LoKrConfig(r=1, **where),
    "VeRA": lambda where: VeraConfig(r=2, **where),
    "OFT": lambda where: OFTConfig(r=1, oft_block_size=0, use_cayley_neumann=False, **where),
    "AdaLoRA": lambda where: AdaLoraConfig(init_r=2, target_r=1, total_step=9, **where),
    "SHiRA": lambda where: ShiraConfig(r=1, **where),
    "(IA)3": lambda where: IA3Config(feedforward_modules=[], **where),
    "BitFit": lambda where: BitFitConfig(**where),
    "bottleneck adapters": lambda where: BottleneckConfig(bottleneck_size=2, **where),
    "ReFT": lambda where: ReftConfig(init_reft_weights="identity", dropout=0.0, **where),
    "LayerNorm tuning": lambda where: LNTuningConfig(**where),
    "trainable tokens": lambda where: TrainableTokensConfig(token_indices=[1, 2], **where),
}


def works_on(config: PeftConfig, layer: nn.Module, x: Tensor) -> bool:
    """Whether the adapter can be set in, starts as the identity, and, if it has merged weights, these compute the same."""
    base = nn.Sequential(copy.deepcopy(layer))
    try:
        model = get_peft_model(base, config)
    except (ValueError, TypeError):
        return False
    with torch.no_grad():
        assert torch.allclose(model(x), layer(x), atol=1e-5)
        for p in model.base_model.adapter_parameters("default"):
            p.add_(torch.randn_like(p))
        before = {name: p.clone() for name, p in model.named_parameters()}
        adapted = model(x)
        if merges(config):
            model.merge_adapter()
            assert torch.allclose(model(x), adapted, atol=1e-4)
            model.unmerge_adapter()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        with model.disable_adapter():
            assert torch.allclose(model(x), layer(x), atol=1e-5)
    return True


def merges(config: PeftConfig) -> bool:
    """Whether the adapter can be written into the base weights."""
    return METHODS_BY_NAME[config.method_name()].mergeable


def takes_a_mixed_batch(config: PeftConfig, layer: nn.Module, x: Tensor) -> bool:
    """Whether every sample of a batch may have its own adapter."""
    model = get_peft_model(nn.Sequential(copy.deepcopy(layer)), config).eval()
    with torch.no_grad():
        for p in model.base_model.adapter_parameters("default"):
            p.add_(torch.randn_like(p))
        mixed = model(x, adapter_names=["default", "__base__"] * 2)
        adapted = model(x)
        with model.disable_adapter():
            base = model(x)
    return torch.allclose(mixed[::2], adapted[::2]) and torch.allclose(mixed[1::2], base[1::2])


def table() -> str:
    """Return the table in Markdown; a cell is "yes" only if it was tried just now."""
    torch.manual_seed(0)
    columns = layers()
    rows = [["method", *columns, "exact unmerge", "an adapter per sample"], ["---"] * (len(columns) + 3)]
    for name, make in METHODS.items():
        found = {}
        for kind, (layer, x) in columns.items():
            where = (
                {"target_parameters": ["weight_of_experts"], "target_modules": []}
                if kind == "experts"
                else {"target_modules": ["0"]}
            )
            try:
                found[kind] = works_on(make(where), layer(), x)
            except TypeError:  # this configuration has no target_parameters
                found[kind] = False
        kind = next(k for k, yes in found.items() if yes)
        mixed = takes_a_mixed_batch(make({"target_modules": ["0"]}), columns[kind][0](), columns[kind][1])
        exact = merges(make({"target_modules": ["0"]}))
        rows.append(
            [
                name,
                *("yes" if found[k] else "-" for k in columns),
                *("yes" if y else "-" for y in (exact, mixed)),
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n\n" + prompt_table()


def prompt_models() -> dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]]:
    """Return tiny models that a prompt may stand in front of, with inputs."""
    import transformers as tf

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    t5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    ids = torch.randint(3, 30, (2, 5))
    image = {"image_size": 8, "patch_size": 4}
    llama = tf.LlamaConfig(vocab_size=30, num_key_value_heads=2, pad_token_id=0, **sizes)
    return {
        "causal LM": (lambda: tf.LlamaForCausalLM(llama), {"input_ids": ids}),
        "encoder-decoder": (
            lambda: tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=30, **t5)),
            {"input_ids": ids, "decoder_input_ids": ids},
        ),
        "encoder with a head": (
            lambda: tf.BertForTokenClassification(tf.BertConfig(vocab_size=30, **sizes)),
            {"input_ids": ids},
        ),
        "images": (
            lambda: tf.ViTForImageClassification(tf.ViTConfig(**image, **sizes)),
            {"pixel_values": torch.randn(2, 3, 8, 8)},
        ),
    }


PROMPTS: dict[str, Callable[[], PeftConfig]] = {
    "prompt tuning": lambda: PromptTuningConfig(num_virtual_tokens=3),
    "P-tuning": lambda: PromptEncoderConfig(num_virtual_tokens=3),
    "prefix tuning, P-Tuning v2": lambda: PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True),
}


def logits(model: nn.Module, given: dict[str, Tensor], **more: Any) -> Tensor:
    """Return what a model computes."""
    found: Tensor = model(**given, **more).logits
    return found


def prompt_works_on(config: PeftConfig, build: Callable[[], nn.Module], given: dict[str, Tensor]) -> bool:
    """Whether a prompt changes what the model computes, and leaves it as it is when it is off."""
    base = build().eval().requires_grad_(False)
    expected = logits(base, given)
    try:
        model = get_peft_model(base, config).eval()
    except ValueError:
        return False
    assert not torch.equal(logits(model, given)[:, -1], expected[:, -1])
    with model.disable_adapter():
        assert torch.equal(logits(model, given), expected)
    return True


def prompt_abilities(
    config: PeftConfig, build: Callable[[], nn.Module], given: dict[str, Tensor]
) -> list[bool]:
    """Try out what a prompt can do besides: checkpointing, a prompt per sample, LoRA beside it, and going on after loading."""
    torch.manual_seed(1)
    base = build().eval()
    state = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, config)
    own = [p for name, p in model.named_parameters() if "prompt_encoder" in name]
    wanted = torch.autograd.grad(logits(model.train(), given).square().sum(), own)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = torch.autograd.grad(logits(model, given, use_cache=False).square().sum(), own)
    checkpointing = all(torch.allclose(a, b, atol=1e-4) for a, b in zip(wanted, found, strict=True))
    model.eval()
    with model.disable_adapter():
        bare = logits(model, given)
    alone = logits(model, given)
    mixed = logits(model, given, adapter_names=["default", "__base__"])
    each = torch.allclose(mixed[0], alone[0], atol=1e-5)
    each = each and torch.allclose(mixed[1, -bare.shape[1] :], bare[1], atol=1e-5)
    model.add_adapter("lora", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter(["default", "lora"])
    beside = not torch.allclose(logits(model, given), alone)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["default"])
        fresh = build().eval()
        fresh.load_state_dict(state)
        again = PeftModel.from_pretrained(fresh, folder, is_trainable=True)
    trained = {name for name, p in again.named_parameters() if p.requires_grad}
    resumed = len(trained) == len(own) and torch.allclose(logits(again, given), alone, atol=1e-5)
    return [checkpointing, each, beside, resumed]


def prompt_table() -> str:
    """Return the table of the methods that act on inputs."""
    torch.manual_seed(0)
    models = prompt_models()
    abilities = ["gradient checkpointing", "an adapter per sample", "beside LoRA", "resumes"]
    rows = [["method", *models, *abilities], ["---"] * (len(models) + len(abilities) + 1)]
    for name, make in PROMPTS.items():
        found = [prompt_works_on(make(), *models[kind]) for kind in models]
        found += prompt_abilities(make(), *models["causal LM"])
        rows.append([name, *("yes" if yes else "-" for yes in found)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def readme_with(text: str) -> str:
    """Return the README with another table in it."""
    old = README.read_text(encoding="utf-8")
    start, end = old.index(BEGIN) + len(BEGIN), old.index(END)
    return f"{old[:start]}\n{text}\n{old[end:]}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    made = table()
    if "--write" in sys.argv[1:]:
        README.write_text(readme_with(made), encoding="utf-8")
    else:
        print(made)
