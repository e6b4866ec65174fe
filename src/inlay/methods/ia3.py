"""(IA)3: multiply what a layer puts out, or reads, by learnt numbers. Liu et al. 2022, https://arxiv.org/abs/2205.05638.

    W' = diag(l) W,  b' = l b        l[out]   keys, values           (the output is multiplied)
    W' = W diag(l),  b' = b          l[in]    feed-forward layers    (the input is multiplied)

l starts at one, so the adapted layer starts as the layer itself. Out or in numbers are trained in place of in * out.
Authors' code: https://github.com/r-three/t-few
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import PeftConfig, PeftType, name_set
from ..injection.targets import matches, model_config
from ..kinds import Conv, Embedding, LayerKind, Norm
from ..method import Column, Method, Slot

_KEYS_VALUES_AND_FEED_FORWARD: dict[str, str] = {
    "k v / wo": "t5",
    "k v / wi_1": "mt5",
    "c_attn / mlp.c_proj": "gpt2 gpt_bigcode",
    "query_key_value / mlp.dense_4h_to_h": "bloom",
    "key value / output.dense": "bert roberta",
    "q_proj k_proj / fc2": "opt",
    "q_proj v_proj / fc_out": "gptj",
    "query_key_value / dense_4h_to_h": "gpt_neox RefinedWebModel RefinedWeb falcon",
    "q_proj v_proj / c_proj": "gpt_neo",
    "q_proj v_proj / fc2": "bart phi",
    "k_proj v_proj / down_proj": "llama mistral",
    "q_proj v_proj / down_proj": "llama4 gemma gemma2 gemma3_text qwen2 qwen3",
    "k_proj v_proj / w2": "mixtral",
    "key_proj value_proj / output.dense": "deberta-v2",
    "in_proj / output.dense": "deberta",
}
DEFAULT_TARGETS: dict[str, tuple[set[str], set[str]]] = {
    model: (set(outputs.split()), set(inputs.split()))
    for names, models in _KEYS_VALUES_AND_FEED_FORWARD.items()
    for outputs, _, inputs in [names.partition(" / ")]
    for model in models.split()
}
"""By ``config.model_type``, as in PEFT: layers whose output, and layers whose input is multiplied."""
_OUTPUT_ONLY = {"mt5"}
"""Model types whose feed-forward layer PEFT multiplies at its output."""


@dataclass(kw_only=True)
class IA3Config(PeftConfig):
    """Configuration of (IA)3. Fields and defaults are those of PEFT 0.21.

    Args:
        target_modules: names (endings of module paths) or one regular expression for whole paths; by default the keys,
            values and feed-forward layers that are usual for the model's type.
        exclude_modules: names or a regular expression of modules to leave out.
        feedforward_modules: those of the targets whose input is multiplied instead of their output.
        fan_in_fan_out: accepted for compatibility; the layout of the weight is known from the layer's class.
        modules_to_save: modules that are trained and saved whole, such as a new head.
        init_ia3_weights: start at one (True) or at random values around zero (False).

    Raises:
        ValueError: ``feedforward_modules`` names something that ``target_modules`` does not.
    """

    peft_type: PeftType | str | None = PeftType.IA3
    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    feedforward_modules: Collection[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.feedforward_modules = name_set(self.feedforward_modules)
        if not isinstance(self.target_modules, set) or not isinstance(self.feedforward_modules, set):
            return
        if beyond := sorted(self.feedforward_modules - self.target_modules):
            raise ValueError(
                f"`feedforward_modules` should be a subset of `target_modules`; {beyond} are not targeted"
            )


class IA3(Method, name="IA3"):
    """W' = diag(l) W or W diag(l); see the top of this file."""

    config = IA3Config

    def default_targets(
        self, config: IA3Config, model: nn.Module, required: bool
    ) -> Collection[str] | str | None:
        outputs, inputs = _usual(model)
        return outputs | inputs or super().default_targets(config, model, required)

    def complete(self, config: IA3Config, model: nn.Module) -> None:
        super().complete(config, model)
        if config.feedforward_modules is None:
            at_output = model_config(model).get("model_type") in _OUTPUT_ONLY
            config.feedforward_modules = set() if at_output else _usual(model)[1]

    def build(self, kind: LayerKind, config: IA3Config, path: str) -> dict[str, Column]:
        if isinstance(kind, Norm):
            raise ValueError(
                f"(IA)3 needs a product; {path} normalises. LNTuningConfig tunes its weights themselves"
            )
        at_input = config.feedforward_modules is not None and matches(path, config.feedforward_modules)
        size = kind.inputs if at_input else kind.out_features
        shape: tuple[int, ...] = (1, size) if at_input else (size, 1)
        if isinstance(kind, Conv):
            shape = (1, size, *[1] * len(kind.kernel_size))
        gain = nn.Parameter(torch.empty(shape, device=kind.device, dtype=kind.dtype))
        return {"ia3_l": gain, "is_feedforward": at_input}

    @torch.no_grad()
    def init(self, slot: Slot) -> None:
        gain: nn.Parameter = slot["ia3_l"]
        if slot.config.init_ia3_weights:  # type: ignore[attr-defined]
            gain.fill_(1.0)
        else:
            gain.normal_()

    def before(self, slot: Slot, x: Tensor) -> Tensor:
        if not slot["is_feedforward"] or isinstance(slot.kind, Embedding):
            return x
        return x * slot.kind.spread_inputs(_gain(slot, x.dtype))

    def after(self, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        if not slot["is_feedforward"]:
            return y * slot.kind.spread(_gain(slot, y.dtype))
        if isinstance(
            slot.kind, Embedding
        ):  # reads one token, so what multiplies the input multiplies the row
            return y * F.embedding(x, _gain(slot, y.dtype).unsqueeze(-1))
        return y

    def merge(self, slot: Slot, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gain = _gain(slot, w.dtype)
        if slot["is_feedforward"]:
            return slot.kind.scale_inputs(w, gain), b
        return gain.unsqueeze(-1) * w, None if b is None else gain * b


def _usual(model: nn.Module) -> tuple[set[str], set[str]]:
    return DEFAULT_TARGETS.get(model_config(model).get("model_type", ""), (set(), set()))


def _gain(slot: Slot, dtype: torch.dtype) -> Tensor:
    gain: Tensor = slot["ia3_l"]
    return gain.to(dtype).flatten()
