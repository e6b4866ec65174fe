"""Adapters in the format of AdapterHub's ``adapters``, both ways.

    folder.py       the files of a folder, and what their keys say
    bottleneck.py   bottleneck adapters, Compacter
    low_rank.py     LoRA and (IA)3
    reft.py         ReFT
    load.py         a folder as adapters of Inlay on a model
    write.py        an adapter of Inlay as such a folder

A folder there holds one adapter, or the parts of a union such as MAM; here each part is an adapter of its own, and all
of them are on together. Heads are not part of it. What cannot be said in the other format is refused by name.
"""

from __future__ import annotations

from .folder import is_adapterhub
from .load import parts_of
from .write import write_adapterhub

__all__ = ["is_adapterhub", "parts_of", "write_adapterhub"]
