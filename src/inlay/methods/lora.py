"""LoRA: a low-rank update of a frozen weight. Hu et al. 2021, https://arxiv.org/abs/2106.09685.

    W' = W + s B A        W[out, in], A[r, in], B[out, r], s = alpha / r   (rsLoRA, arXiv 2312.03732: alpha / sqrt(r))

           x[..., in] --+----------- W ----------(+)--- y[..., out]
                        |                         |
                     dropout -- A -- [..., r] -- B * s

B starts at zero, so the adapted layer starts as the layer itself. r (in + out) numbers are trained instead of in * out.
Authors' code: https://github.com/microsoft/LoRA
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import PeftConfig, PeftType
from ..inits import INITS, EvaConfig, LoftQConfig, changes_base, check_start, is_init, start
from ..injection.targets import pattern_matches
from ..kernels.autocast import autocast_is_on
from ..kernels.lora_linear import lora_linear
from ..kernels.tracing import being_traced
from ..kinds import LayerKind, Linear
from ..method import Column, Method, Slot


@dataclass
class LoraRuntimeConfig:
    """Settings of a run that are not saved."""

    ephemeral_gpu_offload: bool = False


@dataclass(kw_only=True)
class LoraConfig(PeftConfig):
    """Configuration of LoRA and, with ``use_dora``, of DoRA. Fields and defaults are those of PEFT 0.21.

    Args:
        r: rank.
        target_modules: names (endings of module paths) or one regular expression for whole paths, or "all-linear"; by
            default the attention projections that are usual for the model's type.
        exclude_modules: names or a regular expression of modules to leave out.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: probability with which the update's inputs are zeroed in training. It does not apply to embeddings.
        fan_in_fan_out: accepted for compatibility; the layout of the weight is known from the layer's class.
        bias: which biases of the base model are trained: "none", "all" or "lora_only".
        use_rslora: scale by lora_alpha / sqrt(r).
        modules_to_save: modules that are trained and saved whole, such as a new head.
        init_lora_weights: True, False (random, not the identity), or the name of an initialisation in ``inlay.inits``.
        layers_to_transform: index or indices of the blocks to adapt; needs ``target_modules`` as a list.
        layers_pattern: name(s) of the list of blocks, where it is not found by itself.
        rank_pattern, alpha_pattern: r and lora_alpha by name or regular expression.
        trainable_token_indices: rows of the input embedding to train, or {embedding name: rows}.
        loftq_config, eva_config: settings of those initialisations.
        use_dora: learn the length of each row of the weight apart (DoRA).
        layer_replication: [start, end) ranges of blocks to stack anew, sharing the base weights.
        lora_bias: give B a bias.
        target_parameters: names of parameters to adapt in place of modules, such as a 3-d tensor of experts.
        ensure_weight_tying: keep tied embeddings tied in what is trained.

    Raises:
        ValueError: values that contradict each other, or a field of PEFT that Inlay does not implement yet.
    """

    not_implemented: ClassVar[dict[str, Any]] = {
        "megatron_config": None, "corda_config": None, "lora_ga_config": None, "velora_config": None, "kasa_config": None,
        "alora_invocation_tokens": None, "use_qalora": False, "monteclora_config": None, "use_bdlora": None, "arrow_config": None,
    }  # fmt: skip

    peft_type: PeftType | str | None = PeftType.LORA
    r: int = 8
    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict[str, Any] = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.eva_config, dict):
            self.eva_config = EvaConfig(**self.eva_config)
        if isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = vars(self.loftq_config)
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout={self.lora_dropout} is not a probability in [0, 1)")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            )
        if (
            isinstance(self.target_modules, str)
            and self.target_modules != "all-linear"
            and self.layers_to_transform is not None
        ):
            raise ValueError(
                "`layers_to_transform` cannot be used when `target_modules` is a str; name the layers in the expression."
            )
        if isinstance(self.init_lora_weights, str) and not is_init(self.init_lora_weights):
            raise ValueError(
                f"Unknown initialization init_lora_weights={self.init_lora_weights!r}; known: True, False, {sorted(INITS)}"
            )
        if self.init_lora_weights == "loftq" and not self.loftq_config:
            raise ValueError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
        if self.use_dora and self.lora_bias:
            raise ValueError(
                "The argument lora_bias=True is not supported for DoRA, please pass use_dora=False"
            )
        if self.runtime_config.ephemeral_gpu_offload:
            raise ValueError(
                "runtime_config.ephemeral_gpu_offload=True is not implemented in Inlay; leave it at False"
            )

    def method_name(self) -> str:
        return "DORA" if self.use_dora else super().method_name()

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["runtime_config"]
        return values


FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


class Lora(Method, name="LORA"):
    """W' = W + s B A; see the top of this file."""

    config = LoraConfig
    additive = True

    def build(self, kind: LayerKind, config: LoraConfig, path: str) -> dict[str, Column]:
        r = by_pattern(config.rank_pattern, path, config.r)
        alpha = by_pattern(config.alpha_pattern, path, config.lora_alpha)
        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        if config.lora_dropout and not kind.direct:
            raise ValueError(
                f"lora_dropout={config.lora_dropout} is not possible on {path}, whose {kind.param} "
                "is adapted through merged weights; set it to 0"
            )
        check_start(kind, config, r, path)
        down, up = kind.factors(r, up_bias=config.lora_bias)
        names = FACTORS[:2] if isinstance(down, nn.Module) else FACTORS[2:]
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        columns: dict[str, Column] = {"lora_dropout": dropout, names[0]: down, names[1]: up}
        return columns | {"r": r, "lora_alpha": alpha, "scaling": scale_of(alpha, r, config)}

    def changes_base(self, config: LoraConfig) -> bool:
        return changes_base(config)

    def init(self, slot: Slot) -> None:
        start(slot)

    def follows_tying(self, config: LoraConfig) -> bool:
        return config.ensure_weight_tying

    def become_twin(self, slot: Slot, owner: Slot) -> None:
        """Drop the factors: those of the tied weight, transposed, are the owner's, the other way round."""
        for column in [c for c in slot.columns if c in FACTORS]:
            slot.layer.drop(column, slot)
        for column in ("r", "lora_alpha", "scaling"):
            slot.layer.column(column)[slot.name] = owner[column]

    def after(self, slot: Slot, x: Tensor, y: Tensor) -> Tensor:
        down, up, bias = factors(slot, y.dtype)
        if x.is_floating_point():
            x = slot["lora_dropout"](x.to(y.dtype))
        delta = slot.kind.through(x, down, up)
        if bias is not None:
            delta = delta + slot.kind.spread(bias)
        return torch.add(y, delta.to(y.dtype), alpha=slot["scaling"])

    def fused(self, slot: Slot, x: Tensor) -> Tensor | None:
        ready = fused_inputs(slot, x)
        if ready is None:
            return None
        down, up = slot["lora_A"], slot["lora_B"]
        return lora_linear(x, *ready, down.weight, up.weight, slot["scaling"], dropout_now(slot), up.bias)

    def merge(self, slot: Slot, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        down, up, bias = factors(slot, w.dtype)
        if bias is not None:
            b = slot["scaling"] * bias if b is None else b + slot["scaling"] * bias
        return slot.kind.add_product(w, up, down, slot["scaling"]), b

    def delta(self, slot: Slot) -> Tensor:
        down, up, _ = factors(slot, torch.promote_types(slot.kind.dtype, torch.float32))
        scale: float = slot["scaling"]
        return scale * slot.kind.product(up, down)

    def unit_scale(self, slot: Slot) -> float:
        return scale_of(slot["lora_alpha"], slot["r"], slot.config)

    def beyond_merge(self, slot: Slot) -> str | None:
        return "lora_dropout" if dropout_now(slot) else None


def factors(slot: Slot, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the weights of A and B, and B's bias, in the dtype of a computation."""
    if slot.owner is not None:
        down, up, _ = factors(slot.owner, dtype)
        return up.mT, down.mT, None
    down, up = stored_factors(slot)
    bias = slot["lora_B"].bias if "lora_B" in slot.columns else None
    return down.to(dtype), up.to(dtype), None if bias is None else bias.to(dtype)


def stored_factors(slot: Slot) -> tuple[Tensor, Tensor]:
    """Return the weights of A and B as they are kept."""
    if "lora_A" in slot.columns:
        return slot["lora_A"].weight, slot["lora_B"].weight
    return slot["lora_embedding_A"], slot["lora_embedding_B"]


def dropout_now(slot: Slot, column: str = "lora_dropout") -> float:
    """Return the dropout probability that holds at this moment: 0.0 outside training."""
    dropout = slot[column]
    return float(dropout.p) if dropout.training and isinstance(dropout, nn.Dropout) else 0.0


def fused_inputs(slot: Slot, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Return W[out, in] and b where the fused functions apply to this input, else None.

    They apply to plain linear layers in eager mode.
    """
    if not isinstance(slot.kind, Linear) or slot.owner is not None or being_traced():
        return None
    w = slot.weight()
    return (w, slot.bias()) if x.dtype == w.dtype or autocast_is_on(x) else None


def scale_of(alpha: float, r: int, config: Any) -> float:
    """Return s, the number that multiplies B A."""
    return alpha / (math.sqrt(r) if config.use_rslora else r)


def by_pattern(patterns: dict[str, int], path: str, default: int) -> int:
    """Return the value of the first key that is the module's path or an ending of it, as a name or expression."""
    return next((value for key, value in patterns.items() if pattern_matches(key, path)), default)
