"""Every option of every command, defined once: name, type, default, group and help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

TaskName = Literal[
    "text-classification", "token-classification", "causal-lm", "seq2seq", "image-classification"
]
GROUPS = ("what", "data", "columns", "training", "more")
Precision = Literal["fp32", "bf16", "fp16"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]


def option(
    default: Any = None,
    *,
    help: str,
    group: str = "more",
    required: bool = False,
    positional: bool = False,
) -> Any:
    """Return a dataclass field that the parser can show and check."""
    metadata = {"help": help, "group": group, "required": required, "positional": positional}
    factory = default if callable(default) else lambda: default
    return field(default_factory=factory, metadata=metadata)


@dataclass
class Columns:
    """The data's own name for each column that a task reads."""

    text: str = option("text", help="the text (first sentence)", group="columns")
    text2: str = option(
        "text2", help="the second sentence; used where the data has this column", group="columns"
    )
    label: str = option("label", help="the class, or a number for regression", group="columns")
    tokens: str = option("tokens", help="a list of words", group="columns")
    tags: str = option("tags", help="one tag per word", group="columns")
    prompt: str = option("prompt", help="what the model is given", group="columns")
    response: str = option(
        "response", help="what it shall answer; the only part with a loss", group="columns"
    )
    image: str = option(
        "image", help="an image: a path (relative to the data file) or an array", group="columns"
    )


@dataclass
class Chosen:
    """The method and what the user set of its own options."""

    name: str = option(
        "lora",
        help="how to adapt (write --method NAME): a method that 'inlay methods' lists, or full (train all weights), or head"
        " (train only the new head); a method's own options are --method.OPTION: 'inlay train --method NAME --help'",
        group="what",
    )
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Shape:
    """How rows become what the model sees; kept with the adapter, so that predictions see the same."""

    columns: Columns = option(Columns, help="names of the columns in the data", group="columns")
    max_length: PositiveInt | None = option(
        None, help="longest input in tokens; default: what the model can take, at most 512", group="data"
    )
    separator: str = option(
        "\n",
        help="causal-lm: what stands between prompt and response; YAML escapes such as '\"\\n\"' work",
        group="data",
    )
    pack: bool = option(
        False,
        help="causal-lm on plain text: join the rows and cut them into blocks of max-length",
        group="data",
    )


@dataclass
class Train(Shape):
    """Adapt a pretrained model to a task and save the adapter.

    Example: inlay train --model bert-base-uncased --task text-classification --method lora
    --train-data train.jsonl.gz --eval-data dev.jsonl.gz --output-dir out
    """

    model: str = option(help="base model: a folder or a hub id", required=True, group="what")
    task: TaskName = option(help="what the model shall do", required=True, group="what")
    method: Chosen = option(Chosen, help="how to adapt", group="what")
    train_data: str = option(
        help="rows to train on: a .csv, .tsv, .jsonl, .txt, .parquet (or .gz of these) or .npz file, a folder of the"
        " datasets library, or a hub name such as 'org/name:split' or 'org/name:config:split'",
        required=True,
        group="what",
    )
    eval_data: str | None = option(
        help="rows to evaluate on after each epoch; the best checkpoint is kept; default: no evaluation",
        group="what",
    )
    output_dir: str = option(
        help="a new folder for adapter, metrics, curves and checkpoints", required=True, group="what"
    )
    overwrite: bool = option(
        False, help="replace the results in output-dir, once the new ones are complete", group="what"
    )
    resume: bool = option(
        False,
        help="continue the interrupted run in output-dir as if nothing had happened; same options",
        group="what",
    )
    regression: bool | None = option(
        help="text-classification: labels are numbers to predict; default: yes where one has a fraction",
        group="data",
    )
    revision: str | None = option(help="branch, tag or commit of a hub model", group="what")

    epochs: PositiveFloat = option(3.0, help="passes over the training rows", group="training")
    max_steps: PositiveInt | None = option(
        None, help="stop after this many optimiser steps; overrides epochs", group="training"
    )
    batch_size: PositiveInt = option(16, help="rows per device and step", group="training")
    eval_batch_size: PositiveInt = option(32, help="rows per device in evaluation", group="training")
    accumulate: PositiveInt = option(1, help="batches whose gradients make one step", group="training")
    learning_rate: PositiveFloat | None = option(
        help="peak learning rate; default: by method, see 'inlay methods'", group="training"
    )
    schedule: Schedule = option(
        "linear", help="how the learning rate falls after the warm-up", group="training"
    )
    warmup: ClosedUnitInterval = option(
        0.06, help="share of the steps in which the learning rate rises", group="training"
    )
    weight_decay: NonNegativeFloat = option(0.0, help="AdamW's weight decay", group="training")
    eval_steps: PositiveInt | None = option(
        help="evaluate and save every so many steps; default: each epoch", group="training"
    )
    patience: PositiveInt | None = option(
        help="stop after so many evaluations without a better one", group="training"
    )
    seed: int = option(
        0,
        help="seed of heads, adapter, dropout and order; the same seed gives the same run",
        group="training",
    )
    precision: Precision = option("fp32", help="mixed precision of the training step", group="training")
    dtype: Dtype = option(
        "auto", help="what the frozen weights are kept in; auto: as they are stored", group="training"
    )
    r_drop: PositiveFloat | None = option(
        help="draw the predictions of two passes with different dropout together, with this weight, as 4 (R-Drop): twice the"
        " rows per step; for classification and causal-lm",
        group="training",
    )
    gradient_checkpointing: bool = option(
        False, help="less memory, about a third more time", group="training"
    )
    group_by_length: bool = option(
        True, help="batch rows of about the same length: less padding", group="training"
    )
    workers: NonNegativeInt = option(0, help="processes that prepare batches", group="training")
    trainer: dict[str, Any] = option(
        dict,
        help="more arguments of transformers.TrainingArguments, as --trainer.max_grad_norm 0.5",
        group="training",
    )


@dataclass
class Trained:
    """Which trained model to use, and on what."""

    adapter: str | None = option(
        help="an adapter folder, as 'inlay train' leaves it in OUTPUT_DIR/adapter", group="what"
    )
    model: str | None = option(
        help="with --adapter: where the base model is now; alone: a folder that 'inlay merge' wrote, or OUTPUT_DIR/model"
        " of --method full or head",
        group="what",
    )
    batch_size: PositiveInt = option(32, help="rows at a time")
    precision: Precision = option("fp32", help="mixed precision of the forward pass")
    dtype: Dtype = option("auto", help="what the weights are kept in; auto: as they are stored")
    max_new_tokens: PositiveInt = option(64, help="causal-lm and seq2seq: longest generated text, in tokens")
    overwrite: bool = option(False, help="replace the output file")


@dataclass
class Evaluate(Trained):
    """Measure a trained model on labelled rows; prints the metrics as JSON.

    Example: inlay evaluate --adapter out/adapter --data test.jsonl.gz
    """

    data: str = option(help="labelled rows; the same formats as for training", required=True, group="what")
    output: str | None = option(help="also write the metrics to this JSON file", group="what")
    generate: bool = option(False, help="prompt/response: also generate, and count exact matches")


@dataclass
class Predict(Trained):
    """Label, tag or continue new rows; one JSON object per row, in the rows' order.

    Example: inlay predict --adapter out/adapter --data new.jsonl --output predictions.jsonl
    """

    data: str = option(
        help="rows without labels; '-' reads JSONL from standard input", required=True, group="what"
    )
    output: str = option("-", help="a .jsonl file; '-' writes to standard output", group="what")


@dataclass
class Merge:
    """Fold an adapter into its base model; writes a folder that from_pretrained loads without Inlay.

    Example: inlay merge --adapter out/adapter --output-dir merged
    """

    adapter: str = option(help="an adapter folder", required=True, group="what")
    output_dir: str = option(help="a new folder for the merged model", required=True, group="what")
    model: str | None = option(
        help="where the base model is now; default: as the adapter recorded it", group="what"
    )
    dtype: Dtype = option("auto", help="what the weights are kept in; auto: as they are stored")
    overwrite: bool = option(False, help="replace the output folder, once the new one is complete")


@dataclass
class Convert:
    """Turn an AdapterHub adapter into one in PEFT's format, or the other way round; loads no weights of the base model.

    Example: inlay convert adapterhub/sst-2 --model bert-base-uncased --output-dir sst-2
    """

    adapter: str = option(
        help="an adapter folder of either format, a fusion's, or an AdapterHub setup's",
        required=True,
        positional=True,
    )
    output_dir: str = option(help="a new folder", required=True, group="what")
    model: str | None = option(help="the base model; default: as the adapter recorded it", group="what")
    name: str | None = option(
        help="what AdapterHub is to call the adapter; default: default, and of a fusion its members' names",
        group="what",
    )
    overwrite: bool = option(False, help="replace the output folder, once the new one is complete")


@dataclass
class Inspect:
    """Show what an adapter adapts, or what there is to adapt in a model; loads no weights.

    Example: inlay inspect out/adapter
    """

    path: str = option(
        help="an adapter folder, or a model (folder or hub id)", required=True, positional=True
    )
    json: bool = option(False, help="print JSON instead of a table")


@dataclass
class Methods:
    """List the methods, or one method's options.

    Example: inlay methods lora
    """

    name: str | None = option(help="a method", positional=True)
