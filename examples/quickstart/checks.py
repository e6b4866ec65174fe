"""What a saved adapter promises, checked through the library, as a script of yours would use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from docstrings import Example
from inlay import PeftModel

TOLERANCE = 1e-4
"""Largest difference of logits and losses that the order of floating-point sums may make."""


@dataclass(frozen=True)
class Check:
    """One promise, whether it is kept, and the numbers that say so."""

    promise: str
    kept: bool
    found: str


def check_adapter(
    encoder: Path, adapter: Path, splits: dict[str, list[Example]], trained: dict[str, float]
) -> list[Check]:
    """Load an adapter into a fresh base model and return what was found.

    Args:
        encoder: folder of the pretrained model.
        adapter: folder that the training saved.
        splits: the sentences of train, dev and test.
        trained: loss and accuracy on dev that the model in memory had when its training ended.
    """
    labels = sorted({example.library for example in splits["train"]})
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    transformers.utils.logging.set_verbosity_error()  # it would warn of the head, which comes with the adapter
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=len(labels))
    pretrained = _weights(base)
    model = PeftModel.from_pretrained(base, adapter).eval()

    dev = predict(model, tokenizer, splits["dev"])
    reloaded = _same_as_trained(dev, [labels.index(example.library) for example in splits["dev"]], trained)
    adapted = predict(model, tokenizer, splits["test"])
    model.merge_adapter()
    merged = _same_logits(adapted, predict(model, tokenizer, splits["test"]))
    moved = _different(pretrained, _weights(base))
    model.unmerge_adapter()
    return [reloaded, merged, _restored(moved, _different(pretrained, _weights(base)))]


@torch.no_grad()
def predict(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], batch_size: int = 32
) -> Tensor:
    """Return the logits[example, label] of a model."""
    batches = (examples[start : start + batch_size] for start in range(0, len(examples), batch_size))
    encoded = (tokenizer([one.text for one in batch], padding=True, return_tensors="pt") for batch in batches)
    return torch.cat([model(**batch).logits for batch in encoded])


def _same_as_trained(logits: Tensor, wanted: list[int], trained: dict[str, float]) -> Check:
    loss = cross_entropy(logits, torch.tensor(wanted)).item()
    accuracy = (logits.argmax(-1) == torch.tensor(wanted)).double().mean().item()
    return Check(
        "the adapter loaded into a fresh base model is the trained one",
        abs(loss - trained["loss"]) < TOLERANCE and abs(accuracy - trained["accuracy"]) < TOLERANCE,
        f"dev loss {loss:.6f}, in training {trained['loss']:.6f}; "
        f"accuracy {accuracy:.4f}, in training {trained['accuracy']:.4f}",
    )


def _same_logits(adapted: Tensor, merged: Tensor) -> Check:
    distance = (adapted - merged).abs().max().item()
    different = int((adapted.argmax(-1) != merged.argmax(-1)).sum())
    return Check(
        "the merged model predicts what base and adapter predict",
        distance < TOLERANCE and different == 0,
        f"largest difference of logits {distance:.1e}; {different} of {len(adapted)} predictions differ",
    )


def _restored(moved: int, different: int) -> Check:
    return Check(
        "unmerging gives the pretrained weights back, bit for bit",
        moved > 0 and different == 0,
        f"merging changed {moved} tensors; {different} differ after unmerging",
    )


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a copy of the encoder's own weights, by their names in the model without adapters."""
    own = {name: value for name, value in model.base_model.state_dict().items() if "lora_" not in name}
    return {name.replace(".base_layer", ""): value.clone() for name, value in own.items()}


def _different(before: dict[str, Tensor], after: dict[str, Tensor]) -> int:
    return sum(not torch.equal(value, after[name]) for name, value in before.items())
