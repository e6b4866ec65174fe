"""One pair of models for each case, shared by the tests that only look at it, and the warnings that PEFT gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft_cross.cross_cases import CASES, CrossCase

Pair = tuple[CrossCase, Any, Any]

WARNINGS_OF_PEFT = [
    "`is_gradient_checkpointing` is deprecated",  # transformers 5 has renamed what PEFT asks for
    "fan_in_fan_out is set to",  # GPT-2's layers; PEFT sets it by itself
    "LoRA adapter added to ConvNd layer with groups",  # PEFT cannot merge those
    "Setting `save_embedding_layers` to `True`",
    "Adapter '.*'.* LoRA tensor.* have invalid shape",  # PEFT takes the bias of lora_B for a damaged matrix
    "The following rank_pattern keys did not match",  # PEFT's own patterns for fused experts
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
    "Unsupported layer type",  # PEFT says so of its own normalisation layers
    "Careful, disabling adapter layers with bias configured",  # both say so, and it is true
    "Specified to not (save|load) vera_A and vera_B",  # of which PEFT reminds everybody who sets save_projection=False
    "The following alpha_pattern keys did not match",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let PEFT warn as it does; Inlay's own warnings are errors in the other tests of the same models."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for message in WARNINGS_OF_PEFT:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{message}"))


@pytest.fixture(scope="session", params=CASES, ids=lambda case: case.name)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Return a case, Inlay's model and PEFT's, with the same trained values. Leave them as they are."""
    return request.param, *request.param.pair()
