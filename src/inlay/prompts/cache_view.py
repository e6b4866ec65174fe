"""Virtual keys and values, set in where an attention module asks its cache for all keys.

For modules that compute attention themselves and call no attention function of transformers': BERT, RoBERTa and T5 in
transformers 4, GPT-J and Falcon in any. They hand their new keys, rotated already where a model rotates them, to
``cache.update`` and go on with what it returns. So such a module is given a view of its cache, for one call: it passes new keys
on, and returns what the cache holds with the prefix in front. A module that is called without a cache gets a view of none.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import by_name, cached_length, names_in_forward, parameters_of
from .sites import Front, Site, extended_mask

CACHES = ("past_key_values", "past_key_value", "layer_past")
MASKS = ("attention_mask", "mask")
PLAIN = {
    *("self", "hidden_states", *MASKS, *CACHES, "head_mask", "layer_head_mask", "encoder_hidden_states"),
    *("key_value_states", "cache_position", "position_ids", "position_embeddings", "query_length"),
    *("use_cache", "output_attentions", "args", "kwargs"),
}
"""Arguments of an attention module whose scores depend on queries, keys and the mask alone."""
OTHER_SCORES = {"topk", "rfft"}
"""What attention calls that is no softmax over all keys."""


def can_view(module: nn.Module, config: Any) -> bool:
    """Whether a module is an attention that asks its cache for all keys, and scores them by nothing that a prefix disturbs.

    Args:
        module: any module.
        config: the configuration of the model that it belongs to.
    """
    names, called = parameters_of(module), names_in_forward(module)
    biases = {"alibi"} if not getattr(config, "alibi", False) else set()
    if hasattr(module, "compute_bias"):
        biases.add("position_bias")
    return (
        "attention" in type(module).__name__.lower()
        and "update" in called
        and not names.isdisjoint(CACHES)
        and not names.isdisjoint(MASKS)
        and names <= PLAIN | biases
        and OTHER_SCORES.isdisjoint(called)
        and getattr(module, "position_embedding_type", "absolute") in ("absolute", None)
        # A mask of the module's own, as in GPT-Neo, goes by the places of keys.
        and not any(b.dtype == torch.bool for b in module.buffers(recurse=False))
    )


class CacheView:
    """A cache as one attention module sees it in one call, with the prefix in front of what it returns.

    Args:
        given: what the module was called with: the model's cache, or None.
        front: the prefix.
        length: how many own keys are not empty, where the mask does not say it.
        moved: by how much ``cache_position`` was moved for the module.
    """

    def __init__(self, given: Any, front: Front, length: int | None, moved: int) -> None:
        self.given, self.front, self.length, self.moved = given, front, length, moved
        self.cache = getattr(given, "self_attention_cache", given)
        self.asked = False

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        cache_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Pass new keys and values on to the cache, and return all of them with the virtual ones in front."""
        self.asked = True
        if self.cache is not None:
            if self.moved and cache_kwargs:
                cache_kwargs = cache_kwargs | {"cache_position": cache_kwargs["cache_position"] - self.moved}
            more = () if cache_kwargs is None else (cache_kwargs,)
            key_states, value_states = self.cache.update(key_states, value_states, layer_idx, *more)
        return self.front.before(key_states[:, :, : self.length], value_states[:, :, : self.length])

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Return the number of own keys that are cached, as a cache does."""
        return cached_length(self.cache)


class CacheHooks:
    """Hooks by which one attention module gets its view of the cache; ``remove`` takes them out."""

    def __init__(self, module: nn.Module, site: Site) -> None:
        self.site = site
        self.names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        self.cache, self.mask = (
            next(name for name in names if name in self.names) for names in (CACHES, MASKS)
        )
        self.handles = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self.handles:
            handle.remove()

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Replace the cache by a view with the prefix in front, and extend the mask."""
        given = by_name(self.names, args, kwargs)
        states: Tensor = given["hidden_states"]
        front = self.site.live(len(states), states)
        if front is None:
            return None
        mask, length, only, moved = given.get(self.mask), states.shape[1], None, 0
        if mask is None and length > 1 and getattr(module, "is_causal", getattr(module, "is_decoder", False)):
            # The module would tell SDPA "causal", which aligns queries with the first keys, now the prefix. Beyond the
            # queries a static cache is still empty.
            only = length
            mask = states.new_full((1, 1, length, length), torch.finfo(states.dtype).min).triu(1)
        own = cached_length(given.get(self.cache)) + length if mask is None else mask.shape[-1]
        mask = extended_mask(mask, front, own, states, additive=True)
        if hasattr(module, "compute_bias") and given.get("cache_position") is not None:
            moved = front.tokens
            given["cache_position"] = given["cache_position"] + moved
            mask = self._without_distances(module, mask, moved, given)
        return (), given | {self.cache: CacheView(given.get(self.cache), front, only, moved), self.mask: mask}

    def _without_distances(
        self, module: Any, mask: Tensor | None, tokens: int, given: dict[str, Any]
    ) -> Tensor | None:
        """Take the learnt bias for the distances of virtual keys out of the mask, where positions are not counted from them."""
        if self.site.prompts.shift_now() or not module.has_relative_attention_bias or mask is None:
            return mask
        bias = module.compute_bias(
            mask.shape[2], tokens, device=mask.device, cache_position=given["cache_position"]
        )
        left, right = mask[..., :tokens] - bias, mask[..., tokens:]
        return torch.cat([left, right.expand(*left.shape[:3], -1)], dim=-1)

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Make sure that the prefix was taken, and put the model's cache back where a module returns it.

        Raises:
            RuntimeError: the module has not asked its cache for keys.
        """
        view = kwargs.get(self.cache)
        if not isinstance(view, CacheView):
            return None
        if not view.asked:
            raise RuntimeError(
                f"{type(module).__name__} did not ask its cache for keys in this call, so no prefix was set in; "
                "use prompt tuning or LoRA"
            )
        if isinstance(output, tuple) and any(item is view for item in output):
            return tuple(view.given if item is view else item for item in output)
        return None
