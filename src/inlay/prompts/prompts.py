"""The prompt adapters of one model: their encoders, which of them are on, and what they put in front of the inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterFileError
from ..input_method import InputMethod
from ..switch import Switch
from .attention import Splice
from .config import word_embedding
from .encoder import PromptModule, encoder_values
from .positions import Shift
from .tokens import Tokens


class Prompts:
    """The prompt adapters of a model. Their parameters are in ``encoders``, which ``PeftModel`` shows as ``prompt_encoder``.

    Args:
        switch: the model's switch.
    """

    def __init__(self, switch: Switch) -> None:
        self.switch = switch
        self.encoders = nn.ModuleDict()
        self.methods: dict[str, InputMethod] = {}
        self.configs: dict[str, Any] = {}
        self.splicing: set[str] = set()  # names of the adapters that go into the attention
        self.changes: tuple[Splice, Shift] | None = None
        self.kept_mask: tuple[tuple[Any, ...], Tensor] | None = None  # the last one of ``causal_mask``

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"kept_mask": None}

    def __contains__(self, name: object) -> bool:
        return name in self.methods

    # ------------------------------------------------------------------ adapters

    def add(
        self,
        model: nn.Module,
        name: str,
        method: InputMethod,
        config: Any,
        initialise: bool,
        full_precision: bool,
    ) -> None:
        """Build an adapter's encoder. Nothing is changed if the method or the model refuses.

        Raises:
            ValueError: the prompt cannot be put in front of this model's inputs.
        """
        encoder, place = method.build(model, config), _some_parameter(model)
        if initialise and not config.inference_mode and place.device.type != "meta":
            method.init(encoder, model, config)
        encoder.to(place.device)
        if not full_precision and place.is_floating_point():
            encoder.to(place.dtype)
        encoder.train(model.training)
        if method.splices:
            if self.changes is None:
                self.changes = (Splice(model, self), Shift(model, self))
            self.splicing.add(name)
        self.methods[name], self.configs[name], self.encoders[name] = method, config, encoder
        self._listen()

    def remove(self, name: str) -> None:
        """Take an adapter out, and with the last prefix all that was changed in the model for it."""
        del self.methods[name], self.configs[name], self.encoders[name]
        self.splicing.discard(name)
        self._listen()
        if not self.splicing and self.changes is not None:
            for change in self.changes:
                change.remove()
            self.changes = None

    def _listen(self) -> None:
        """Let the attention tell what it reads, if and only if a gate asks for it."""
        if self.changes is not None:
            self.changes[0].listen(any(self.gated(name) for name in self.splicing))

    def clear(self) -> None:
        """Take all adapters out."""
        for name in list(self.methods):
            self.remove(name)

    def encoder(self, name: str) -> PromptModule:
        """Return an adapter's encoder."""
        encoder = self.encoders[name]
        assert isinstance(encoder, PromptModule)
        return encoder

    def engage(self) -> None:
        """Make sure that the attention asks for prefixes, where one is on."""
        setting = self.switch.now()
        if self.changes is not None and setting.enabled:
            self.changes[0].engage()

    # ------------------------------------------------------------------ what is on

    def names(self) -> list[str]:
        """Return the prompt adapters that a forward pass uses, in the order in which they act."""
        setting = self.switch.now()
        chosen = setting.active if setting.route is None else tuple(dict.fromkeys(setting.route))
        return [name for name in chosen if name in self.methods] if setting.enabled else []

    def put_tokens(self) -> bool:
        """Whether an adapter that is on may put virtual tokens in front of the input."""
        return not all(self.methods[name].splices for name in self.names())

    def prefix(self, name: str, layer: int) -> tuple[Tensor, Tensor]:
        """Return an adapter's virtual keys and values ``[heads, n, d]`` of a layer."""
        prefix = self.methods[name].prefix(self.encoder(name), self.configs[name], layer)
        assert prefix is not None
        return prefix

    def gated(self, name: str) -> bool:
        """Whether an adapter's prefix is multiplied by gates."""
        return self.methods[name].gated(self.configs[name])

    def gated_now(self) -> bool:
        """Whether the prefix of an adapter that is on is."""
        return any(self.gated(name) for name in self.names())

    def gates(self, name: str, layer: int, x: Tensor) -> Tensor:
        """Return what a layer's virtual keys and values are multiplied by, ``[batch, 2]``, given what it reads."""
        return self.methods[name].gates(self.encoder(name), self.configs[name], layer, x)

    def causal_mask(self, query: Tensor, tokens: int) -> Tensor:
        """Return a mask ``[1, 1, t, tokens + t]`` to add to scores: ``query[..., t, d]`` sees the prefix, and what is not later.

        All layers share one: it is made once, and kept for backward once. The model forgets it when it returns.
        """
        key = (query.shape[-2], tokens, query.dtype, query.device)
        compiling, last = torch.compiler.is_compiling(), self.kept_mask
        if last is not None and last[0] == key and not compiling and type(query) is Tensor:
            return last[1]
        with torch.inference_mode(False):  # it may serve training later
            shut = torch.full((), float("-inf"), dtype=query.dtype, device=query.device)
            mask = shut.repeat(1, 1, query.shape[-2], tokens + query.shape[-2]).triu_(tokens + 1)
        if not compiling and type(mask) is Tensor:  # a fake one would turn up in real runs
            self.kept_mask = key, mask
        return mask

    def forget_mask(self) -> None:
        """Forget the mask that layers share: a long text's takes more memory than the adapter."""
        self.kept_mask = None

    def shift_now(self) -> int | tuple[int, ...]:
        """Return by how much the prefixes that are on move positions: one number, or one for each sample of a mixed batch."""
        if not self.splicing:
            return 0
        setting, names = self.switch.now(), self.names()
        by = {name: self.methods[name].shift(self.configs[name]) for name in names}
        if setting.route is None:
            return sum(by.values())
        each = tuple(by.get(name, 0) for name in setting.route)
        return each[0] if len(set(each)) == 1 else each

    def tokens(self, rows: int, like: Tensor) -> Tokens | None:
        """Return the virtual tokens in front of a batch of this many rows, or None where no adapter has any.

        Args:
            rows: number of samples.
            like: the embedded input, whose dtype and device they take.
        """
        own: dict[str, Tensor] = {}
        for name in self.names():
            made = self.methods[name].tokens(self.encoder(name), self.configs[name])
            if made is not None:
                own[name] = made.to(like)
        if not own:
            return None
        route = self.switch.now().route
        if route is None:
            return Tokens.same_for_all(torch.cat(list(own.values())), rows)
        nothing = next(iter(own.values()))[:0]
        return Tokens.of_each([own.get(name, nothing) for name in route], rows)

    # ------------------------------------------------------------------ values and files

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of an adapter's encoder."""
        yield from self.encoder(name).parameters()

    def state(self, name: str, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return what training needs beside the prompt itself: the encoder, where it computes the prompt.

        Args:
            name: the adapter.
            state_dict: the whole model's, gathered from several devices; the encoder's own by default.
        """
        encoder = self.encoder(name)
        return encoder.state_dict() | encoder_values(state_dict, name) if encoder.computes else {}

    def check_state(self, name: str, state: dict[str, Tensor], origin: Any) -> None:
        """Make sure that a saved encoder fits the one that is there.

        Raises:
            AdapterFileError: it was not saved, or has other shapes.
        """
        own = {key: tuple(t.shape) for key, t in self.encoder(name).state_dict().items()}
        if not state:
            raise AdapterFileError(
                f"{origin} holds the prompt that was computed, but not the network that computes it, so its training cannot go "
                "on (PEFT saves no more); load it with is_trainable=False"
            )
        if {key: tuple(t.shape) for key, t in state.items()} != own:
            raise AdapterFileError(
                f"the network saved at {origin} does not fit adapter {name!r}; nothing was loaded. "
                "Was another configuration passed?"
            )


def _some_parameter(model: nn.Module) -> Tensor:
    try:
        weight: Tensor = word_embedding(model).weight
    except ValueError:  # a model of images
        weight = next(model.parameters())
    return weight


__all__ = ["Prompts"]
