"""Adapters in the format of AdapterHub's ``adapters``, both ways.

    folder.py       the files of a folder, and what their keys say
    bottleneck.py   bottleneck adapters, Compacter
    low_rank.py     LoRA and (IA)3
    prefix.py       prefix tuning
    fusion.py       fusions of bottleneck adapters
    setup.py        compositions
    reft.py         ReFT
    load.py         a folder as adapters of Inlay on a model
    write.py        an adapter of Inlay, or several that act together, as such a folder

A folder there holds one adapter, or the parts of a union such as MAM; here each part is an adapter of its own, and all
of them are on together. Heads are not part of it. What cannot be said in the other format is refused by name.
"""

from __future__ import annotations

from .folder import is_adapterhub
from .load import Part, parts_of
from .write import write_adapterhub, write_union

__all__ = ["Part", "is_adapterhub", "parts_of", "write_adapterhub", "write_union"]
