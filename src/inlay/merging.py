"""Writing adapters into base weights, and taking the wrappers off: the part of ``AdaptedModel`` that leads to a plain model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn
from tqdm.auto import tqdm

from .composition import Block, beyond_weights
from .config import PeftConfig
from .injection.tied import note_untied
from .injection.walk import places
from .layers.extras import ModulesToSaveWrapper, TrainableTokensWrapper
from .layers.layer import AdaptedLayer
from .layers.output import AdaptedOutput, not_linear
from .layers.torch_fast_paths import restore_fast_paths
from .method import Method
from .prompts.prompts import Prompts
from .switch import Switch


class MergeableModel(nn.Module):
    """A model whose adapters can be merged. ``AdaptedModel`` has what is only declared here."""

    model: nn.Module
    switch: Switch
    prompts: Prompts
    methods: dict[str, Method]
    peft_config: dict[str, PeftConfig]
    _wrapped: list[nn.Module] | None

    if TYPE_CHECKING:

        def layers(self) -> Iterator[AdaptedLayer]: ...
        def saved_modules(self) -> Iterator[ModulesToSaveWrapper]: ...
        def _check_known(self, names: Sequence[str]) -> None: ...

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters (the active ones by default) into the base weights; ``unmerge_adapter`` undoes it exactly.

        Raises:
            ValueError: an adapter is unknown, a prompt, or of a method without a merged form; base layers are shared by
                ``layer_replication``; or ``safe_merge`` found weights that are not finite. Nothing is merged then.
        """
        self._check_mergeable(adapter_names)
        done: list[AdaptedLayer] = []
        try:
            for layer in self.layers():
                if not layer.merged_adapters:
                    done.append(layer)
                layer.merge(safe_merge, adapter_names)
        except BaseException:
            for layer in done:
                layer.unmerge()
            raise

    def unmerge_adapter(self) -> None:
        """Put the base weights back, bit for bit."""
        for layer in self.layers():
            layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Return the base model with the adapters merged in for good and no wrapper left.

        Args:
            progressbar: show the progress over the layers.
            safe_merge: refuse weights that are not finite, before anything is changed.
            adapter_names: which adapters, in order; the active ones by default.

        Raises:
            ValueError: as ``merge_adapter``.
        """
        self._check_one_copy(adapter_names)
        if safe_merge:  # all or nothing: the layers are merged before the first is unwrapped
            self.merge_adapter(adapter_names, safe_merge=True)
        self._check_mergeable(adapter_names)
        names = tuple(adapter_names) if adapter_names is not None else self.switch.now().active
        for place in tqdm(
            list(places(self.model).values()), disable=not progressbar, desc="Unloading and merging model"
        ):
            if place.wrapper is not place.module:
                place.replace(_merged_for_good(place.wrapper, names, adapter_names))
        return self._bare()

    def unload(self) -> nn.Module:
        """Return the base model as it was before any adapter (blocks that ``layer_replication`` made stay)."""
        self.unmerge_adapter()
        for layer in self.layers():
            if isinstance(layer, AdaptedOutput):
                layer.release()
        for place in places(self.model).values():
            if place.wrapper is not place.module:
                place.replace(place.module)
        return self._bare()

    def _bare(self) -> nn.Module:
        self.prompts.clear()
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        note_untied(self.model)
        restore_fast_paths(self.model)
        self._wrapped = None
        return self.model

    def _check_one_copy(self, adapter_names: Sequence[str] | None) -> None:
        """Raise ValueError where the composition to be merged runs several copies of a saved module."""
        if adapter_names is None and self.switch.now().composition is not None:
            for module in self.saved_modules():
                module.current()

    def _check_mergeable(self, adapter_names: Sequence[str] | None) -> None:
        self._check_known(adapter_names or ())
        setting = self.switch.now()
        tree: Block | None = setting.composition if adapter_names is None else None
        if tree is not None:
            if (block := beyond_weights(tree)) is not None:
                raise ValueError(
                    f"{block!r} depends on what a layer reads, so it cannot be written into the weights; "
                    "a Stack or an Average of adapters can, and so can one adapter: adapter_names=[...]"
                )
            if any(layer.merged_adapters and layer.merged_composition != tree for layer in self.layers()):
                raise ValueError(
                    f"{tree!r} cannot be merged upon other adapters; call unmerge_adapter() first"
                )
        wanted = setting.active if adapter_names is None else adapter_names
        if prompts := [name for name in wanted if name in self.prompts]:
            raise ValueError(
                f"adapters {prompts} act on the model's inputs, so they cannot be merged into its weights; name others in "
                "adapter_names, or activate others with set_adapter"
            )
        for name in wanted:
            if not self.methods[name].mergeable:
                raise ValueError(not_linear(name, self.methods[name]))
        if any(getattr(c, "layer_replication", None) for c in self.peft_config.values()):
            raise ValueError(
                "layers made by layer_replication share their base weights, so their adapters cannot be merged into them"
            )


def _merged_for_good(wrapper: nn.Module, names: Sequence[str], asked: Sequence[str] | None) -> nn.Module:
    while isinstance(wrapper, (AdaptedLayer, TrainableTokensWrapper)):
        if isinstance(wrapper, TrainableTokensWrapper):
            wrapper = wrapper.token_adapter
            continue
        wrapper.merge(adapter_names=asked)
        if isinstance(wrapper, AdaptedOutput):
            wrapper.release()
        wrapper.originals = {}
        wrapper = wrapper.base_layer
    if isinstance(wrapper, ModulesToSaveWrapper):
        if asked is None and wrapper.switch.now().composition is not None:
            return wrapper.current()
        chosen = [n for n in names if n in wrapper.modules_to_save]
        return wrapper.modules_to_save[chosen[0]] if chosen else wrapper.original_module
    return wrapper
