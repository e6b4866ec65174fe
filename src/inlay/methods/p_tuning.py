"""P-tuning: virtual tokens that a small network computes. Liu et al. 2021, https://arxiv.org/abs/2103.10385.

    E' = [T; E],  T = MLP(X)              X[n, d] trained, T[n, d], hidden width h
                  T = MLP(LSTM(X))        LSTM in both directions

It does not start as the identity. After training only T is needed: PEFT's file holds T alone, and a second file beside it
holds the network, with which training can go on.
Authors' code: https://github.com/THUDM/P-tuning
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn

from ..config import PeftType
from ..input_method import InputMethod
from ..prompts.config import PromptLearningConfig, settle_common, settle_width
from ..prompts.encoder import PromptModule
from .field_values import warn_of_idle


class PromptEncoderReparameterizationType(str, Enum):
    """The network that computes the virtual tokens."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass(kw_only=True)
class PromptEncoderConfig(PromptLearningConfig):
    """Configuration of P-tuning.

    Args:
        encoder_reparameterization_type: "MLP" (three linear layers) or "LSTM" (followed by two).
        encoder_hidden_size: width of the network; that of the word embeddings by default.
        encoder_num_layers: layers of the LSTM; an MLP always has the same.
        encoder_dropout: dropout between the layers of the LSTM.

    Raises:
        ValueError: the type of network is unknown.
    """

    peft_type: PeftType | str | None = PeftType.P_TUNING
    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = (
        PromptEncoderReparameterizationType.MLP
    )
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [kind.value for kind in PromptEncoderReparameterizationType]
        if self.encoder_reparameterization_type not in known:
            raise ValueError(
                f"encoder_reparameterization_type={self.encoder_reparameterization_type!r} is unknown; it is one of {known}"
            )
        self.encoder_reparameterization_type = PromptEncoderReparameterizationType(
            self.encoder_reparameterization_type
        )
        for name in ("encoder_hidden_size", "encoder_num_layers"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r} must be a positive whole number")
        if self.encoder_reparameterization_type == "MLP":
            warn_of_idle(self, "encoder_num_layers", 2, "encoder_reparameterization_type='LSTM'")
            warn_of_idle(self, "encoder_dropout", 0.0, "encoder_reparameterization_type='LSTM'")


class PromptEncoder(PromptModule):
    """The virtual tokens of one adapter and the network that computes them, or, for inference, its outputs alone."""

    def __init__(self, config: PromptEncoderConfig) -> None:
        d = int(config.token_dim or 0)
        super().__init__(config.total_virtual_tokens, d)
        if config.inference_mode:
            return
        h = config.encoder_hidden_size or d
        if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM:
            layers, dropout = config.encoder_num_layers, config.encoder_dropout
            self.lstm_head = nn.LSTM(d, h, layers, dropout=dropout, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, d))
        else:
            self.mlp_head = nn.Sequential(
                nn.Linear(d, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, d)
            )

    @property
    def computes(self) -> bool:
        """Whether there is a network."""
        return "mlp_head" in self._modules

    def encode(self, embedded: Tensor) -> Tensor:
        """Run the network, where there is one."""
        if "lstm_head" in self._modules:
            embedded = self.lstm_head(embedded)[0]
        return self.mlp_head(embedded) if self.computes else embedded


class PTuning(InputMethod, name="P_TUNING"):
    """E' = [network(X); E]; see the top of this file."""

    config = PromptEncoderConfig

    def complete(self, config: PromptEncoderConfig, model: nn.Module) -> None:
        settle_common(config, model)
        settle_width(config, model)
        if config.encoder_hidden_size is None:
            config.encoder_hidden_size = config.token_dim

    def build(self, model: nn.Module, config: PromptEncoderConfig) -> PromptEncoder:
        return PromptEncoder(config)

    def tokens(self, encoder: PromptModule, config: PromptEncoderConfig) -> Tensor:
        return encoder.prompt()[: config.num_virtual_tokens]
