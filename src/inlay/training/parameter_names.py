"""A model's parameters by name: tied ones under all their names, patterns that must match, and a word for those that do not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn


@dataclass
class NamedParameter:
    """A parameter under all its names (more than one where it is tied).

    Attributes:
        trained: whether it shall be trained; for now, whether it is.
        norm: whether it belongs to a normalisation layer.
    """

    parameter: nn.Parameter
    names: list[str]
    trained: bool
    norm: bool

    @property
    def can_learn(self) -> bool:
        """Whether it can have a gradient: integers, packed weights among them, cannot."""
        return self.parameter.is_floating_point() or self.parameter.is_complex()

    @property
    def size(self) -> int:
        """How many numbers it stands for; bitsandbytes packs two of 4 bits into one."""
        packed = type(self.parameter).__name__ == "Params4bit"
        return self.parameter.numel() * (2 * self.parameter.element_size() if packed else 1)

    def is_bias(self) -> bool:
        """Whether a name says so: ``bias``, ``in_proj_bias``, and ``bias_ih_l0`` and the like of recurrent layers."""
        return any(re.search(r"bias(_[ih]h\w*)?$", name) for name in self.names)


def named_parameters(model: nn.Module) -> list[NamedParameter]:
    """Return every parameter once, in the model's order."""
    found: dict[int, NamedParameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, p in module._parameters.items():
            if p is not None:
                named = found.setdefault(id(p), NamedParameter(p, [], p.requires_grad, _is_norm(module)))
                named.names.append(f"{path}.{leaf}" if path else leaf)
    return list(found.values())


def _is_norm(module: nn.Module) -> bool:
    known = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
    return isinstance(module, known) or re.search(r"Norm(\dd)?$", type(module).__name__) is not None


def matching(parameters: Sequence[NamedParameter], patterns: list[str] | None, argument: str) -> set[int]:
    """Return the ids of the parameters that patterns match.

    Args:
        parameters: the model's.
        patterns: patterns of ``fnmatch``; None matches nothing.
        argument: what the patterns are called by whoever gave them: ``include`` or ``exclude``.

    Raises:
        ValueError: a pattern matches nothing, or is to train integers.
    """
    found: set[int] = set()
    for pattern in patterns or ():
        hits = [n for n in parameters if any(fnmatchcase(name, pattern) for name in n.names)]
        if not hits:
            names = [name for n in parameters for name in n.names]
            raise ValueError(
                f"{argument} pattern {pattern!r} matches no parameter{_suggestion(pattern, names)}"
            )
        if argument == "exclude" and not any(n.can_learn for n in hits):
            raise ValueError(
                f"exclude pattern {pattern!r} matches {hits[0].names[0]!r}, whose integers cannot be trained"
            )
        found |= {id(n.parameter) for n in hits}
    return found


def _suggestion(pattern: str, names: Sequence[str]) -> str:
    """Return a did-you-mean clause: a module's name without its dot and star, or a misspelt word in the pattern."""
    words = {word for name in names for word in name.split(".")}
    corrected = pattern
    for word in re.split(r"[.*?\[\]]+", pattern):
        if word and word not in words and (near := difflib.get_close_matches(word, words, n=1)):
            corrected = corrected.replace(word, near[0])
    for candidate in (f"{pattern}.*", f"*{pattern}", f"*{pattern}.*", corrected, f"{corrected}.*"):
        if any(fnmatchcase(name, candidate) for name in names):
            return f"; did you mean {candidate!r}?"
    return f"; the model's parameters are {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
