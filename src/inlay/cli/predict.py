"""``inlay predict``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .data import read_table
from .engine import Engine
from .files import check_new, new_file
from .options import Predict
from .trained import load_trained


def run(options: Predict) -> None:
    """Write one JSON object per row.

    Raises:
        UserError: the model or the data does not fit; no output file is left.
    """
    target = None if options.output == "-" else check_new(Path(options.output), overwrite=options.overwrite)
    model, task = load_trained(options.adapter, options.model, options.dtype)
    table = read_table(options.data, task.accepted_layouts(), task.settings.columns, targets=False)
    answers = task.answer(
        Engine(model, task, options.batch_size, options.precision, options.max_new_tokens), table
    )
    lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    if target is None:
        sys.stdout.writelines(lines)
        return
    with new_file(target) as path, path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)
    print(f"{target}  ({len(table):,} rows)")
