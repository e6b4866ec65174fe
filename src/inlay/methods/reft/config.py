"""The configuration of ReFT."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from ...config import PeftConfig, PeftType
from ..bottleneck.activations import activation
from ..field_values import check_share, check_switches

PRESETS: dict[str, dict[str, Any]] = {
    "loreft": {},
    "noreft": {"orthogonality": False},
    "direft": {"orthogonality": False, "subtract_projection": False},
}
"""What differs between the three forms of the paper."""


@dataclass(kw_only=True)
class ReftConfig(PeftConfig):
    """Configuration of ReFT. Fields and defaults are AdapterHub's where it has them; by default it is LoReFT.

    Args:
        r: rank of the intervention, the number of directions that it changes.
        prefix_positions: how many positions from a sequence's first token on are changed.
        suffix_positions: how many positions up to the last token of the prompt are changed; without a prompt (see
            docs/methods/reft.md), of the sequence. Where both meet, the suffix's intervention acts.
        layers: numbers of the blocks that are changed, or "all"; counted from 0 through the whole model, or, with
            ``target_modules``, in each list of blocks.
        orthogonality: keep the rows of R orthonormal (LoReFT); False trains R freely (NoReFT).
        subtract_projection: replace what the rows of R read (LoReFT, NoReFT); False adds to it (DiReFT).
        tied_weights: one intervention for the first and the last positions; False gives each its own.
        non_linearity: function of W h + b, by the name that transformers gives it; None for none.
        dropout: probability of setting an element of a changed position's representation to zero in training.
        init_reft_weights: "random" starts as pyreft and AdapterHub do, which changes the model a little; "identity" starts with
            W = R (of DiReFT: W = 0) and b = 0, so that the model starts as itself.
        target_modules: instead of a model's blocks, names (endings of module paths) or one regular expression for whole paths
            of any modules that put out ``[rows, positions, features]``.
        exclude_modules: names or a regular expression of modules to leave out.
        hidden_size: width of the outputs of ``target_modules``, where it cannot be read from them.
        modules_to_save: modules that are trained and saved whole, such as a new head.

    Raises:
        ValueError: a value is unknown or out of range, or fields contradict each other.
    """

    peft_type: PeftType | str | None = PeftType.REFT
    r: int = 1
    prefix_positions: int = 3
    suffix_positions: int = 0
    layers: list[int] | Literal["all"] = "all"
    orthogonality: bool = True
    subtract_projection: bool = True
    tied_weights: bool = False
    non_linearity: str | None = None
    dropout: float = 0.05
    init_reft_weights: Literal["random", "identity"] = "random"
    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    hidden_size: int | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("r", self.r, 1)
        _check_count("prefix_positions", self.prefix_positions, 0)
        _check_count("suffix_positions", self.suffix_positions, 0)
        if self.hidden_size is not None:
            _check_count("hidden_size", self.hidden_size, 1)
        if not self.prefix_positions and not self.suffix_positions:
            raise ValueError(
                "prefix_positions=0 and suffix_positions=0 leave no position to change; set one of them"
            )
        self._check_layers()
        check_share("dropout", self.dropout)
        check_switches(self, "orthogonality", "subtract_projection", "tied_weights")
        if self.non_linearity is not None:
            activation(self.non_linearity)
        if self.init_reft_weights not in ("random", "identity"):
            raise ValueError(
                f"init_reft_weights={self.init_reft_weights!r} is unknown; choose 'random' or 'identity'"
            )
        if self.init_reft_weights == "identity" and self.non_linearity is not None:
            raise ValueError(
                f"init_reft_weights='identity' has no meaning with non_linearity={self.non_linearity!r}: act(R h) is not R h; "
                "leave one of them out"
            )

    def _check_layers(self) -> None:
        if self.layers == "all":
            return
        if not isinstance(self.layers, (list, tuple, set, range)) or not self.layers:
            raise ValueError(f"layers={self.layers!r} must be 'all' or a list of the numbers of blocks")
        self.layers = list(self.layers)
        for number in self.layers:
            _check_count("layers", number, 0)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ReftConfig:
        """Return a form of ReFT by its name, with changes: ``ReftConfig.preset("noreft", r=4)``.

        Args:
            name: "loreft", "noreft" or "direft".
            **changes: fields of the configuration.

        Raises:
            ValueError: there is no such form, or as for the configuration itself.
        """
        return cls(**(cls.preset_fields(name) | changes))

    @staticmethod
    def preset_names() -> list[str]:
        """Return the names that ``preset`` takes."""
        return list(PRESETS)

    @staticmethod
    def preset_fields(name: str) -> dict[str, Any]:
        """Return the fields that a preset sets.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            near = difflib.get_close_matches(str(name), PRESETS, n=1)
            raise ValueError(
                f"unknown preset {name!r}{f'; did you mean {near[0]!r}?' if near else ''} (known: {', '.join(PRESETS)})"
            )
        return dict(PRESETS[name])


def _check_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
