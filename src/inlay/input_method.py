"""The contract of a method that changes what a model is given instead of what its layers compute.

It is the sibling of ``Method``: one file per method in ``methods/`` fills it in, registered by the same names. An input method
says what stands in front, and the machinery in ``prompts/`` puts it there:

    tokens(encoder)          T[n, d]                in front of the embedded input            prompt tuning, P-tuning
    prefix(encoder, layer)   K, V[heads, n, d]      in front of the layer's keys and values   prefix tuning, P-Tuning v2

Both are made by the adapter's prompt encoder, one small module per adapter in ``PeftModel.prompt_encoder``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from .method import METHODS

if TYPE_CHECKING:
    from .config import PeftConfig
    from .prompts.encoder import PromptModule


class InputMethod:
    """How an adapter changes a model's inputs. A subclass registers itself: ``class PTuning(InputMethod, name="P_TUNING")``.

    One object serves one adapter and keeps nothing.
    """

    config: ClassVar[type[PeftConfig]]
    splices: ClassVar[bool] = False
    """Whether ``prefix`` gives keys and values, so that the model's attention has to be prepared for them."""

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name:
            METHODS[name] = cls

    def complete(self, config: Any, model: nn.Module) -> None:
        """Fill in, in place, what the user left open and what depends on the model, such as its width.

        Raises:
            ValueError: the model cannot take such a prompt, or the configuration does not fit it.
        """

    def build(self, model: nn.Module, config: Any) -> PromptModule:
        """Return the prompt encoder of one adapter, with initial values that do not need the model's own.

        Args:
            model: the base model.
            config: the adapter's completed configuration; where it says ``inference_mode``, an encoder that holds what would
                be computed is enough.
        """
        raise NotImplementedError

    def init(self, encoder: PromptModule, model: nn.Module, config: Any) -> None:
        """Set initial values that come from the model. Not called where they are about to be loaded."""

    def tokens(self, encoder: PromptModule, config: Any) -> Tensor | None:
        """Return the virtual tokens ``T[n, d]`` that stand in front of the embedded input, or None."""
        return None

    def prefix(self, encoder: PromptModule, config: Any, layer: int) -> tuple[Tensor, Tensor] | None:
        """Return the virtual keys and values ``K[heads, n, d], V[heads, n, d]`` of a layer's self-attention, or None.

        It is called by each layer, also when gradient checkpointing runs a layer again, so it must not remember a graph.
        """
        return None

    def gated(self, config: Any) -> bool:
        """Whether ``gates`` is to be asked, which needs what the attention reads."""
        return False

    def gates(self, encoder: PromptModule, config: Any, layer: int, x: Tensor) -> Tensor:
        """Return what a layer's virtual keys and values are multiplied by, ``[batch, 2]``.

        Called where ``gated`` says so, with what the layer's attention reads, ``x[batch, t, d]``.
        """
        raise NotImplementedError

    def shift(self, config: Any) -> int:
        """Return by how much a prefix moves the positions of the model's own tokens."""
        return 0
