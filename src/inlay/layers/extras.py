"""What is trained beside the adapted layers: whole modules (``modules_to_save``) and single rows of an embedding.

    ModulesToSaveWrapper                             TrainableTokensWrapper
    |- original_module   frozen                      `- token_adapter   an AdaptedLayer of the method TRAINABLE_TOKENS
    `- modules_to_save   {adapter: trained copy}

Both follow the model's switch, so they are switched, disabled and routed together with the adapter they belong to.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..composition import Block
from ..composition.modules import chosen_copy, run_copies
from ..composition.rows import groups_of
from ..switch import Switch
from .layer import AdaptedLayer


class ModulesToSaveWrapper(nn.Module):
    """A module of the base model and one trained copy of it for each adapter that saves it."""

    def __init__(self, module: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.switch = switch

    def add(self, name: str) -> nn.Module:
        """Give an adapter its own copy, starting from the original's values."""
        self.modules_to_save[name] = copy.deepcopy(self.original_module).requires_grad_(True)
        return self.modules_to_save[name]

    def remove(self, name: str) -> None:
        """Drop an adapter's copy."""
        if name in self.modules_to_save:
            del self.modules_to_save[name]

    def current(self) -> nn.Module:
        """Return the copy that is active, or the original."""
        setting = self.switch.now()
        if setting.composition is not None and setting.enabled:
            chosen = chosen_copy(setting.composition, self._copies(), self.original_module)
            if isinstance(chosen, Block):
                raise ValueError(
                    f"{chosen!r} runs several copies of a saved {type(self.original_module).__name__}, so there is no single "
                    "one to read or to keep"
                )
            return chosen
        names = [n for n in setting.active if n in self.modules_to_save] if setting.enabled else []
        return self.modules_to_save[names[0]] if names else self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active copy; in a mixed batch, each sample's own."""
        setting = self.switch.now()
        if setting.composition is not None and setting.enabled and setting.route is None:
            copies = self._copies()
            return run_copies(setting.composition, copies, self.original_module, *args, **kwargs)
        if setting.route is None or not setting.enabled:
            return self.current()(*args, **kwargs)
        return self._run_mixed(setting.route, *args, **kwargs)

    def _copies(self) -> dict[str, nn.Module]:
        return dict(self.modules_to_save.items())

    def _run_mixed(self, route: tuple[str, ...], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        copies = self._copies()
        groups = groups_of(route, copies, len(x), "a saved module")
        return groups.run(lambda name, rows: copies.get(name, self.original_module)(rows, *args, **kwargs), x)

    @property
    def weight(self) -> Tensor:
        """The active copy's weight."""
        weight: Tensor = self.current().weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The active copy's bias."""
        bias: Tensor | None = self.current().bias  # type: ignore[assignment]
        return bias

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(super().__getattr__("original_module"), name)


class TrainableTokensWrapper(nn.Module):
    """An embedding (or the output layer tied to it) of which single rows are trained."""

    def __init__(self, layer: AdaptedLayer) -> None:
        super().__init__()
        self.token_adapter = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer with its trained rows."""
        return self.token_adapter(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "token_adapter":
                raise
            return getattr(super().__getattr__("token_adapter"), name)


def find_saved(paths: Iterable[str], names: Sequence[str]) -> list[str]:
    """Return the paths of modules that ``modules_to_save`` names, outermost only."""
    found: list[str] = []
    for path in paths:
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if not inside and any(path == name or path.endswith(f".{name}") for name in names):
            found.append(path)
    return found
