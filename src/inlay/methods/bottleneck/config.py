"""The configuration of bottleneck adapters."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from ...config import PeftConfig, PeftType
from ..field_values import check_block_numbers, check_share, check_switches, warn_of_idle
from .activations import activation
from .presets import ALIASES, PRESETS, preset_fields

PLACEMENTS: dict[str, tuple[str, ...]] = {
    "attention": ("attention",),
    "feedforward": ("feedforward",),
    "both": ("attention", "feedforward"),
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "placement": (*PLACEMENTS, None),
    "init_weights": ("bert", "lora", "mam_adapter", "houlsby"),
    "residual_before_ln": (True, False, "post_add"),
    "hypercomplex_nonlinearity": ("glorot-uniform", "glorot-normal", "normal"),
    "phm_c_init": ("normal", "uniform"),
    "inv_adapter": ("nice", None),
}
"""The values of fields that have few."""
SWITCHES = (
    "parallel", "original_ln_before", "original_ln_after", "adapter_residual_before_ln", "ln_before", "ln_after", "use_gating",
    "phm_layer", "factorized_phm_W", "shared_phm_rule", "shared_W_phm", "learn_phm", "phm_bias",
)  # fmt: skip


@dataclass(kw_only=True)
class BottleneckConfig(PeftConfig):
    """Configuration of bottleneck adapters. Fields are AdapterHub's where it has them.

    Args:
        placement: which sub-layers of a transformer are adapted: "attention", "feedforward" or "both" (the default).
        target_modules: instead of ``placement``, names (endings of module paths) or one regular expression for whole paths of
            any modules; y is then the module's output, and the residual r its first input.
        exclude_modules: names or a regular expression of modules to leave out; with ``placement``, of the last modules of
            sub-layers.
        parallel: let the adapter read the residual and add to the output (He et al.), instead of reading the output.
        reduction_factor: width of the layer / width of the bottleneck; a number, or {number of the block: number} with a
            "default".
        bottleneck_size: width of the bottleneck itself, in place of ``reduction_factor``; given in the same two ways.
        non_linearity: function between the projections, by the name that transformers gives it.
        original_ln_before: give the adapter what the model makes of the output: the residual added and, in post-norm models,
            the model's own normalisation.
        original_ln_after: let the model add the residual and normalise after the adapter, as it does without.
        residual_before_ln: what is added to the adapter's result: True, the output; "post_add", the output with the residual;
            False, what the adapter was given.
        adapter_residual_before_ln: add that before the adapter's own normalisation (``ln_after``) instead of behind it.
        ln_before, ln_after: a normalisation of the adapter's own before and after it.
        scaling: factor of the adapter's result: a number, "learned" (one number) or "channel" (one for each feature).
        use_gating: multiply the result by a learned gate between 0 and 1, the mean over the positions of a sequence. In causal
            models a position's gate then knows of later ones.
        dropout: probability of setting an element of the result to zero in training.
        stochastic_depth: probability of leaving the adapter out for a sample in training.
        init_weights: "lora" or "mam_adapter": the adapter starts as the zero map, so that the model starts as itself; "bert":
            normal values of deviation 0.02; "houlsby": truncated ones of deviation 0.01.
        leave_out: numbers of the blocks without adapters, counted from 0 through the whole model.
        phm_layer: build the projections from sums of Kronecker products (Compacter).
        phm_dim: number of products n; it must divide the widths of layer and bottleneck.
        phm_rank: rank of their larger factor.
        factorized_phm_W: keep that factor as a product of rank ``phm_rank``; False keeps it whole.
        shared_phm_rule: one rule A for all layers and projections; False gives each projection its own.
        shared_W_phm: one larger factor for all layers, one each for the ways down and up.
        learn_phm: train the rule; False leaves it as it was drawn.
        phm_bias: whether the projections have a bias.
        phm_init_range: standard deviation (or half the range) of a shared rule; a rule of its own starts with 0.01.
        phm_c_init: "normal" or "uniform".
        hypercomplex_nonlinearity: how the larger factor is drawn: "glorot-uniform", "glorot-normal" or "normal".
        low_rank: rank of the projections (MindPet's and OpenDelta's low-rank adapter); None keeps them dense.
        hidden_size: width of the outputs of ``target_modules``, where it cannot be read from them.
        modules_to_save: modules that are trained and saved whole, such as a new head.
        inv_adapter: "nice" puts MAD-X's invertible adapter behind the embeddings, and its inverse in front of the head of a
            language model.
        inv_adapter_reduction_factor: half the width of the embeddings / width of the invertible adapter's bottlenecks; 2 where it
            is left at None.

    Raises:
        ValueError: a value is unknown or out of range, or fields contradict each other.
    """

    peft_type: PeftType | str | None = PeftType.BOTTLENECK
    placement: Literal["attention", "feedforward", "both"] | None = None
    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    parallel: bool = False
    reduction_factor: float | dict[str, float] = 16
    bottleneck_size: int | dict[str, int] | None = None
    non_linearity: str = "relu"
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | Literal["post_add"] = True
    adapter_residual_before_ln: bool = False
    ln_before: bool = False
    ln_after: bool = False
    scaling: float | Literal["learned", "channel"] = 1.0
    use_gating: bool = False
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    init_weights: Literal["bert", "lora", "mam_adapter", "houlsby"] = "mam_adapter"
    leave_out: list[int] = field(default_factory=list)
    phm_layer: bool = False
    phm_dim: int = 4
    phm_rank: int = 1
    factorized_phm_W: bool = True
    shared_phm_rule: bool = True
    shared_W_phm: bool = False
    learn_phm: bool = True
    phm_bias: bool = True
    phm_init_range: float = 1e-4
    phm_c_init: Literal["normal", "uniform"] = "normal"
    hypercomplex_nonlinearity: Literal["glorot-uniform", "glorot-normal", "normal"] = "glorot-uniform"
    low_rank: int | None = None
    hidden_size: int | None = None
    modules_to_save: list[str] | None = None
    inv_adapter: Literal["nice"] | None = None
    inv_adapter_reduction_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reduction_factor", "bottleneck_size"):
            if isinstance(value := getattr(self, name), dict):
                setattr(self, name, {str(key): number for key, number in value.items()})
        if self.inv_adapter is not None and self.inv_adapter_reduction_factor is None:
            self.inv_adapter_reduction_factor = 2
        self._check_values()
        self._check_together()

    @classmethod
    def preset(cls, name: str, **changes: Any) -> BottleneckConfig:
        """Return a known configuration by its name, with changes: ``BottleneckConfig.preset("seq_bn", reduction_factor=8)``.

        Args:
            name: double_seq_bn (or houlsby), seq_bn (pfeiffer), double_seq_bn_inv (houlsby+inv), seq_bn_inv (pfeiffer+inv),
                par_bn (parallel), scaled_par_bn, compacter, compacterpp (compacter++), adapter_plus, low_rank,
                mindpet_adapter or gated_lora; see ``presets.py``.
            **changes: fields of the configuration.

        Raises:
            ValueError: there is no such preset, or as for the configuration itself.
        """
        return cls(**(preset_fields(name) | changes))

    @staticmethod
    def preset_names() -> list[str]:
        """Return the names that ``preset`` takes."""
        return [*PRESETS, *ALIASES]

    @staticmethod
    def preset_fields(name: str) -> dict[str, Any]:
        """Return the fields that a preset sets.

        Raises:
            ValueError: there is no such preset.
        """
        return preset_fields(name)

    def _check_values(self) -> None:
        if str(self.inv_adapter) == "glow":
            raise ValueError(
                "inv_adapter='glow' is not implemented in Inlay; 'nice', the form of the MAD-X paper, is"
            )
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if not any(value == k and type(value) is type(k) for k in known):
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, known))}")
        activation(self.non_linearity)
        check_switches(self, *SWITCHES)
        if not self.phm_layer:
            warn_of_idle(self, "phm_dim", 4, "phm_layer=True")
        for name in ("dropout", "stochastic_depth"):
            check_share(name, getattr(self, name))
        for name in ("reduction_factor", "bottleneck_size", "inv_adapter_reduction_factor"):
            _check_sizes(name, getattr(self, name))
        for name in ("phm_dim", "phm_rank", "low_rank", "hidden_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a positive whole number")
        if self.phm_init_range <= 0:
            raise ValueError(f"phm_init_range={self.phm_init_range!r} must be positive")
        scaling: Any = self.scaling
        numeric = isinstance(scaling, (int, float)) and not isinstance(scaling, bool)
        if scaling not in ("learned", "channel") and not (numeric and math.isfinite(scaling)):
            raise ValueError(f"scaling={scaling!r} must be a finite number, 'learned' or 'channel'")
        self.leave_out = check_block_numbers("leave_out", self.leave_out)

    def _check_together(self) -> None:
        if self.target_modules is not None and not self.target_modules:
            raise ValueError(
                f"target_modules={self.target_modules!r} names no module; leave it out to adapt a transformer's sub-layers"
            )
        if self.placement is not None and self.target_modules:
            raise ValueError(
                f"placement={self.placement!r} and target_modules both say where the adapters go; give one of them"
            )
        if self.inv_adapter is None and self.inv_adapter_reduction_factor is not None:
            raise ValueError(
                f"inv_adapter_reduction_factor={self.inv_adapter_reduction_factor!r} has no meaning without inv_adapter='nice'"
            )
        if self.inv_adapter is not None and self.target_modules:
            raise ValueError(
                f"inv_adapter={self.inv_adapter!r} sits behind the embeddings of a transformers model, which target_modules does "
                "not know; use placement"
            )
        if self.target_modules and not self.original_ln_after:
            raise ValueError(
                "original_ln_after=False leaves out a step of a transformer's sub-layer, which modules chosen by target_modules "
                "do not have; use placement"
            )
        if self.parallel and (
            self.original_ln_before or self.residual_before_ln is not True or self.adapter_residual_before_ln
        ):
            raise ValueError(
                "a parallel adapter reads the residual and adds to the output: original_ln_before, residual_before_ln and "
                "adapter_residual_before_ln have no meaning for it; leave them at False, True and False"
            )
        if self.residual_before_ln == "post_add" and not self.original_ln_before:
            raise ValueError(
                "residual_before_ln='post_add' needs original_ln_before=True, which adds the residual"
            )
        if self.adapter_residual_before_ln and not self.ln_after:
            raise ValueError("adapter_residual_before_ln=True has no meaning without ln_after=True")
        if self.phm_layer and self.low_rank is not None:
            raise ValueError("phm_layer=True and low_rank are two forms of the projections; choose one")
        if self.init_weights == "houlsby" and (self.phm_layer or self.low_rank is not None):
            raise ValueError(
                "init_weights='houlsby' draws dense projections; factors are drawn as hypercomplex_nonlinearity says, "
                "and init_weights='mam_adapter' makes the adapter start as the zero map"
            )
        if self.shared_W_phm and not self.phm_layer:
            raise ValueError("shared_W_phm=True has no meaning without phm_layer=True")


def _check_sizes(name: str, value: Any) -> None:
    if isinstance(value, dict):
        if wrong := [key for key in value if key != "default" and not key.isdigit()]:
            raise ValueError(f"{name} has the keys {wrong}; they must be numbers of blocks, or 'default'")
        for number in value.values():
            _check_sizes(name, number)
    elif value is not None:
        whole = name == "bottleneck_size"
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not number or value <= 0:
            raise ValueError(f"{name}={value!r} must be a positive {'whole number' if whole else 'number'}")
