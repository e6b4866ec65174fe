"""R-Drop against MindPet's numbers, against the paper written out in float64, and against finite differences."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from inlay import RDropLoss, rdrop_repeat

CASES = ["b4c3_a4", "b8c10_a0.5", "b6c4_a0", "b6c4_ignore_index", "b4c3_identical_pairs"]


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, np.ndarray]:
    return dict(np.load(shared / "goldens" / "mindpet" / "rdrop.npz"))


def gradient(loss: RDropLoss, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, labels)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


# ---------------------------------------------------------------------- MindPet


def test_all_golden_cases_are_tried(shared: Path) -> None:
    told = json.loads((shared / "goldens" / "mindpet" / "rdrop.json").read_text())
    assert {case["name"] for case in told["cases"]} <= set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_mindpets(golden: dict[str, np.ndarray], case: str) -> None:
    logits, labels = (torch.from_numpy(golden[f"{case}.{name}"]) for name in ("logits", "labels"))
    alpha = float(golden[f"{case}.alpha"])
    loss = RDropLoss(alpha, compatibility="mindpet")
    value, grad = gradient(loss, logits, labels)
    np.testing.assert_allclose(value, golden[f"{case}.loss"], atol=1e-5)
    np.testing.assert_allclose(grad, golden[f"{case}.grad.logits"], atol=1e-5)
    value, grad = gradient(loss, logits.double(), labels)
    np.testing.assert_allclose(value, golden[f"{case}.loss64"], atol=1e-12)
    np.testing.assert_allclose(grad, golden[f"{case}.grad64_detached"], atol=1e-12)


@pytest.mark.parametrize("name", ["repeat1d", "repeat2d", "repeat3d"])
def test_repeat_orders_rows_as_mindpet(golden: dict[str, np.ndarray], name: str) -> None:
    (found,) = rdrop_repeat(torch.from_numpy(golden[f"{name}.in"]))
    np.testing.assert_array_equal(found, golden[f"{name}.out"])


# ---------------------------------------------------------------------- the paper


def written_out(logits: Tensor, labels: Tensor, alpha: float, ignored: int = -100) -> float:
    """The paper's equations, halved, one position at a time in Python's own numbers."""
    classes = logits.shape[-1]
    rows = logits.double().reshape(len(logits) // 2, 2, -1, classes)
    soft = labels.is_floating_point()
    truth = labels.reshape(len(labels) // 2, 2, rows.shape[2], *([classes] if soft else []))
    terms = []
    for sample in range(rows.shape[0]):
        for token in range(rows.shape[2]):
            target = truth[sample, 0, token]
            if not soft and int(target) == ignored:
                continue
            p, q = (log_softmax(rows[sample, run, token].tolist()) for run in (0, 1))
            weights = target.tolist() if soft else [float(c == int(target)) for c in range(classes)]
            nll = -sum(w * (a + b) for w, a, b in zip(weights, p, q, strict=True))
            kl = sum(math.exp(a) * (a - b) + math.exp(b) * (b - a) for a, b in zip(p, q, strict=True))
            terms.append((nll + alpha / 2 * kl) / 2)
    return sum(terms) / len(terms)


def log_softmax(values: list[float]) -> list[float]:
    top = max(values)
    total = top + math.log(sum(math.exp(v - top) for v in values))
    return [v - total for v in values]


def batch(*shape: int, soft: bool = False) -> tuple[Tensor, Tensor]:
    """Logits of a doubled batch and its labels."""
    logits = torch.randn(*shape, dtype=torch.float64) * 2
    half = (shape[0] // 2, *shape[1:-1])
    labels = torch.rand(*half, shape[-1]).double().softmax(-1) if soft else torch.randint(0, shape[-1], half)
    return logits, rdrop_repeat(labels)[0]


@pytest.mark.parametrize("alpha", [0, 1.0, 4])
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "probabilities"])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3), (4, 7, 5)])
def test_the_default_is_the_paper(shape: tuple[int, ...], soft: bool, alpha: float) -> None:
    logits, labels = batch(*shape, soft=soft)
    assert float(RDropLoss(alpha)(logits, labels)) == pytest.approx(
        written_out(logits, labels, alpha), abs=1e-12
    )


def test_ignored_tokens_have_no_part_in_either_term() -> None:
    logits, labels = batch(6, 5, 4)
    labels[0:2, 1:3] = labels[4:6, 0] = -100
    found, grad = gradient(RDropLoss(), logits, labels)
    assert float(found) == pytest.approx(written_out(logits, labels, 4.0), abs=1e-12)
    assert (grad[labels == -100] == 0).all() and (grad[labels != -100] != 0).all()
    own = labels.masked_fill(labels == -100, 9)
    torch.testing.assert_close(RDropLoss(ignore_index=9)(logits, own), found)


def test_where_nothing_has_a_loss_it_is_zero() -> None:
    logits, labels = batch(4, 5)
    found, grad = gradient(RDropLoss(), logits, torch.full_like(labels, -100))
    assert float(found) == 0 and (grad == 0).all()


def test_without_alpha_it_is_cross_entropy() -> None:
    logits, labels = batch(4, 7, 5)
    labels[0:2, 3:] = -100
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(RDropLoss(0)(logits, labels), expected)


def test_the_weight_does_not_grow_with_the_batch() -> None:
    logits, labels = batch(4, 5)
    more = logits.repeat(8, 1), labels.repeat(8)
    torch.testing.assert_close(RDropLoss()(*more), RDropLoss()(logits, labels))
    mindpet = RDropLoss(compatibility="mindpet")
    assert mindpet(*more) > mindpet(logits, labels) + 1


@pytest.mark.parametrize("soft", [False, True], ids=["classes", "probabilities"])
def test_the_gradient_passes_through_both_sides(soft: bool) -> None:
    logits, labels = batch(4, 3, 5, soft=soft)
    if not soft:
        labels[2:, 0] = -100
    assert torch.autograd.gradcheck(lambda x: RDropLoss(3.0)(x, labels), logits.requires_grad_())


def test_parts_summed_make_the_mean() -> None:
    logits, labels = batch(8, 6, 5)
    labels[0:2, :5] = -100
    total = RDropLoss(reduction="sum")
    parts = total(logits[:4], labels[:4]) + total(logits[4:], labels[4:])
    torch.testing.assert_close(parts / (labels[::2] != -100).sum(), RDropLoss()(logits, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compatibility", [None, "mindpet"])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, compatibility: Any) -> None:
    logits, labels = batch(4, 5)
    logits = (logits * 100).to(dtype)  # probabilities far below what either type can hold
    value, grad = gradient(RDropLoss(compatibility=compatibility), logits, labels)
    exact, exact_grad = gradient(RDropLoss(compatibility=compatibility), logits.double(), labels)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-2, atol=1e-2)


def test_it_draws_predictions_together() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
    apart = {}
    for alpha in (0.0, 20.0):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3))
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(60):
            inputs, labels = rdrop_repeat(x, y)
            optimizer.zero_grad()
            RDropLoss(alpha)(model(inputs), labels).backward()
            optimizer.step()
        with torch.no_grad():
            first, second = model(x).softmax(-1), model(x).softmax(-1)
        apart[alpha] = float((first - second).abs().mean())
    assert apart[20.0] < 0.5 * apart[0.0]


# ---------------------------------------------------------------------- requests that cannot be met


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"alpha": "4"}, TypeError, "alpha must be a number, not str"),
        ({"alpha": True}, TypeError, "alpha must be a number, not bool"),
        ({"alpha": -1}, ValueError, "alpha must be 0 or more and finite, not -1"),
        ({"alpha": math.nan}, ValueError, "not nan"),
        ({"compatibility": "bert4keras"}, ValueError, "must be None or 'mindpet', not 'bert4keras'"),
        ({"reduction": "none"}, ValueError, "must be 'mean' or 'sum', not 'none'"),
        ({"reduction": "sum", "compatibility": "mindpet"}, ValueError, "leave it at 'mean'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        RDropLoss(**arguments)


@pytest.mark.parametrize(
    ("logits", "labels", "settings", "told"),
    [
        (torch.zeros(3, 5), torch.zeros(3).long(), {}, "even number of rows"),
        (torch.zeros(0, 5), torch.zeros(0).long(), {}, "even number of rows"),
        (torch.zeros(4), torch.zeros(4).long(), {}, "even number of rows"),
        (torch.zeros(4, 5), torch.zeros(2).long(), {}, r"classes \[4\] or probabilities \[4, 5\]"),
        (torch.zeros(4, 5), torch.zeros(4), {}, r"labels \[4\] \(torch.float32\) do not fit"),
        (torch.zeros(4, 3, 5), torch.zeros(4).long(), {}, r"classes \[4, 3\]"),
        (torch.zeros(4, 5), torch.tensor([0, 1, 0, 1]), {}, "double the batch by rdrop_repeat"),
        (
            torch.zeros(4, 3, 5),
            torch.zeros(4, 3).long(),
            {"compatibility": "mindpet"},
            r"takes logits\[2B, C\]",
        ),
        (torch.zeros(4, 5), torch.zeros(4, 5), {"compatibility": "mindpet"}, r"integer labels\[2B\]"),
    ],
)
def test_shapes_that_do_not_fit(logits: Tensor, labels: Tensor, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        RDropLoss(**settings)(logits, labels)


def test_only_tensors_with_rows_are_repeated() -> None:
    with pytest.raises(TypeError, match="takes tensors, not list"):
        rdrop_repeat(torch.zeros(2), [1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0-d"):
        rdrop_repeat(torch.tensor(1))
