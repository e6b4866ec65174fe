"""One pair of models for each case, shared by the tests that only look at it."""

from __future__ import annotations

from typing import Any

import pytest
from peft_cross.cross_cases import CASES, CrossCase

Pair = tuple[CrossCase, Any, Any]


@pytest.fixture(scope="session", params=CASES, ids=lambda case: case.name)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Return a case, Inlay's model and PEFT's, with the same trained values. Leave them as they are."""
    return request.param, *request.param.pair()
