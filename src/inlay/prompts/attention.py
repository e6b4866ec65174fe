"""Virtual keys and values, set in where transformers' attention modules call their attention function.

The modules look the function up by the name in their configuration, so a prefix needs no cache: the name is replaced by one of
ours, whose function puts the prefix in front of keys, values and mask and calls the present one. The cache never holds the
prefix. So what is cached equals what is not, static caches and sliding windows need no room for it, models without a cache
(BERT, ViT) take it as well, and gradient checkpointing, which switches the cache off, finds it again. Modules that call no such
function are served by ``cache_view.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..arguments import names_in_forward
from .cache_view import CacheHooks, can_view
from .sites import ATTRIBUTE, Site, extended_mask

if TYPE_CHECKING:
    from .prompts import Prompts

OURS = {"sdpa": "inlay_prefix_sdpa", "eager": "inlay_prefix_eager"}
"""Our name for each attention implementation that a prefix can be set into."""
INTERFACE = "ALL_ATTENTION_FUNCTIONS"


def register() -> None:
    """Make our names known to transformers; masks are made as for the implementation that is wrapped."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    for theirs, ours in OURS.items():
        AttentionInterface.register(ours, _sdpa if theirs == "sdpa" else _eager)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ours, ALL_MASK_ATTENTION_FUNCTIONS[theirs])


def self_attentions(model: nn.Module) -> list[nn.Module]:
    """Return the self-attention modules that take a prefix, in order: the decoder's, of a model that has one.

    Raises:
        ValueError: there are none.
    """
    root = decoder_of(model)
    own = [m for path, m in root.named_modules() if not _is_cross(path, m)]
    found = [m for m in own if goes_through_interface(m) and getattr(m, "config", None) is not None]
    found = found or [m for m in own if can_view(m, getattr(root, "config", None))]
    if not found:
        classes = sorted(
            {type(m).__name__ for m in model.modules() if "attention" in type(m).__name__.lower()}
        )
        raise ValueError(
            f"{type(model).__name__} has no self-attention that a prefix can be set into"
            f"{f': {classes[0]} takes it neither at an attention function of transformers nor in a cache' if classes else ''}"
            "; use prompt tuning or LoRA"
        )
    return found


def goes_through_interface(module: nn.Module) -> bool:
    """Whether a module looks its attention function up in transformers' table."""
    return INTERFACE in names_in_forward(module)


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the part of a model whose self-attention takes a prefix: its decoder or language model, or all of it."""
    decoder = getattr(model, "get_decoder", lambda: None)()
    return decoder if isinstance(decoder, nn.Module) else model


def _is_cross(path: str, module: nn.Module) -> bool:
    name = f"{'.'.join(path.split('.')[-2:])} {type(module).__name__}".lower()
    return bool(getattr(module, "is_cross_attention", False)) or any(
        word in name for word in ("cross", "encoder_attn", "encdec")
    )


class Splice:
    """What is changed in a model so that its attention asks for prefixes; ``remove`` changes it back."""

    def __init__(self, model: nn.Module, prompts: Prompts) -> None:
        modules = self_attentions(model)
        self.modules = modules if goes_through_interface(modules[0]) else []
        self.root = decoder_of(model)
        # Buckets of distances, as in T5, are learnt by the first layer alone, and shared by the others.
        biased = next((m for m in modules if getattr(m, "has_relative_attention_bias", False)), None)
        for config in self._configs():
            _check_implementation(model, config)
        register()
        sites = [Site(prompts, index, biased) for index in range(len(modules))]
        for module, site in zip(self.modules, sites, strict=False):
            setattr(module, ATTRIBUTE, site)
        self.hooks = [] if self.modules else list(map(CacheHooks, modules, sites))
        self.engage()

    def _configs(self) -> Iterator[Any]:
        owners = self.modules or [self.root]
        yield from {id(m.config): m.config for m in owners}.values()

    def engage(self) -> None:
        """Put our names into the configurations, again where somebody has chosen another implementation since.

        Raises:
            ValueError: prefixes cannot be set into that implementation.
        """
        for config in self._configs():
            if config._attn_implementation not in OURS.values():
                _check_implementation(None, config)
                if self.modules:
                    config._attn_implementation = OURS[config._attn_implementation or "eager"]

    def listen(self, on: bool) -> None:
        """Keep what each attention module reads, for gates, or no more."""
        for module in self.modules:
            getattr(module, ATTRIBUTE).listen(module, on)

    def remove(self) -> None:
        """Take the sites and hooks out and give the configurations their own names back."""
        theirs = {ours: name for name, ours in OURS.items()}
        for module in self.modules:
            delattr(module, ATTRIBUTE)
        for hook in self.hooks:
            hook.remove()
        for config in self._configs():
            config._attn_implementation = theirs.get(config._attn_implementation, config._attn_implementation)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make our names known in the process that unpickles a model."""
        self.__dict__.update(state)
        register()


def _check_implementation(model: nn.Module | None, config: Any) -> None:
    name = config._attn_implementation or "eager"
    if name not in OURS and name not in OURS.values():
        raise ValueError(
            f"prefix tuning cannot be set into attn_implementation={name!r}"
            f"{f' of {type(model).__name__}' if model is not None else ''}; load the model with "
            'attn_implementation="sdpa" (or "eager"), or call model.set_attn_implementation("sdpa")'
        )


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    site: Site | None = module.__dict__.get(ATTRIBUTE)
    front = site.live(query.shape[0]) if site is not None else None
    if front is not None and site is not None:
        length = query.shape[2]
        causal, joined = kwargs.get("is_causal"), None
        if mask is None and length > 1 and (getattr(module, "is_causal", True) if causal is None else causal):
            # SDPA would be told "causal" and align queries with the first keys, which are the prefix now. What a static
            # cache has beyond the queries is still empty.
            key, value = key[:, :, :length], value[:, :, :length]
            joined = site.prompts.causal_mask(query, front.tokens)
            mask = None if front.allowed is None else joined[..., front.tokens :]
        kwargs = _with_bias(site, front.tokens, query, key, mask, kwargs)
        whole = joined is not None and front.allowed is None
        mask = joined if whole else extended_mask(mask, front, key.shape[2], key)
        key, value = front.before(key, value)
        kwargs["is_causal"] = False  # the mask says it all
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Any:
    site: Site | None = module.__dict__.get(ATTRIBUTE)
    front = site.live(query.shape[0]) if site is not None else None
    if front is not None and site is not None:
        kwargs = _with_bias(site, front.tokens, query, key, mask, kwargs)
        mask = extended_mask(mask, front, key.shape[2], key, additive=True)
        key, value = front.before(key, value)
    return _own_eager(type(module))(module, query, key, value, mask, **kwargs)


def _with_bias(
    site: Site, tokens: int, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Extend the bias for distances, of models that have one, over the prefix."""
    bias = kwargs.get("position_bias")
    if bias is None:
        return kwargs
    bias = bias[..., : key.shape[2]]
    return kwargs | {
        "position_bias": torch.cat([site.distances(tokens, query, key, mask).to(bias), bias], dim=-1)
    }


def _own_eager(module_class: type) -> Any:
    """Return the eager attention function of the file that a module's class comes from."""
    for base in module_class.__mro__:
        function = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise ValueError(
        f"{module_class.__name__} has no eager attention function; load the model with attn_implementation='sdpa'"
    )
