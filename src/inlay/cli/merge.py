"""``inlay merge``."""

from __future__ import annotations

from .errors import told_as
from .files import check_new, new_folder
from .options import Merge
from .trained import load_trained, save_trained


def run(options: Merge) -> None:
    """Write the base model with the adapter folded in.

    Raises:
        UserError: the adapter does not fit its base, or cannot be merged (a prompt, for example).
    """
    target = check_new(options.output_dir, overwrite=options.overwrite)
    model, task = load_trained(options.adapter, options.model, options.dtype)
    with told_as(f"cannot merge {options.adapter}"):
        merged = model.merge_and_unload()
    with new_folder(target) as folder:
        save_trained(merged, task, folder)
    print(f"{target}  ({sum(p.numel() for p in merged.parameters()):,} parameters)")
