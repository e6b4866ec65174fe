"""``inlay evaluate``."""

from __future__ import annotations

import json
from pathlib import Path

from .data import read_table
from .engine import Engine, match_share, tidy
from .errors import UserError
from .files import check_new, write_json
from .options import Evaluate
from .trained import load_trained


def run(options: Evaluate) -> None:
    """Print the metrics of a trained model on labelled rows.

    Raises:
        UserError: the model or the data does not fit.
    """
    output = None if options.output is None else check_new(options.output, overwrite=options.overwrite)
    model, task = load_trained(options.adapter, options.model, options.dtype)
    table = read_table(options.data, task.accepted_layouts(), task.settings.columns)
    if options.generate and not (task.generates and "response" in table):
        raise UserError(
            "--generate counts exact responses: it needs a causal-lm or seq2seq model and rows of prompts with responses"
        )
    engine = Engine(model, task, options.batch_size, options.precision, options.max_new_tokens)
    metrics = tidy(engine.predict(task.encode(table)).metrics)
    if options.generate:
        generated = [answer["generated"] for answer in task.answer(engine, table)]
        metrics["exact_match"] = match_share(generated, table["response"])
    report = {"data": options.data, "rows": len(table), **metrics}
    if output is not None:
        write_json(Path(output), report)
    print(json.dumps(report, indent=2))
