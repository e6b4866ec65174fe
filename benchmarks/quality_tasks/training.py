"""One plain training loop, the same for every task and method."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from instruments import saved_bytes
from torch import Tensor, nn

from inlay import RDropLoss, rdrop_repeat

from .methods import Method, sizes
from .task import Batch, Example, Task

WARM_UP = 0.1
LARGEST_GRADIENT = 1.0
CALIBRATION = 4
"""Batches that a method may look at before it chooses what to train."""


def run(
    task: Task, method: Method, rate: float, seed: int, splits: dict[str, list[Any]], shared: Path
) -> dict[str, Any]:
    """Train once and return scores (of the splits that are not "train"), sizes and times.

    The seed decides the new parameters and the order of the batches, which is the same for every method.
    """
    torch.manual_seed(seed)
    model = task.model(shared, method.pretrained)
    total = sum(p.numel() for p in model.parameters())
    stream = batches(task, splits["train"], seed)
    model = method.prepare(task, model, [next(stream) for _ in range(CALIBRATION)])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = method.dropout
    held_out = {split: _in_batches(task, splits[split]) for split in splits if split != "train"}
    training_mode(model)
    first = next(batches(task, splits["train"], seed))
    dynamic = saved_bytes(model, lambda: loss_of(task, method, model, first))
    before = {} if task.new_head else {"before": score(task, model, held_out["dev"])}
    milliseconds, last = _train(task, method, model, rate, batches(task, splits["train"], seed))
    return {
        **{split: score(task, model, part) for split, part in held_out.items()},
        **before,
        **sizes(task, total, model),
        "dynamic": dynamic,
        "milliseconds": milliseconds,
        "train_loss": last,
    }


def _train(
    task: Task, method: Method, model: nn.Module, rate: float, stream: Iterator[Batch]
) -> tuple[float, float]:
    """Return processor milliseconds per step and the mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, fused=True)
    steps_itself = hasattr(model, "stepping_adapters") and bool(model.stepping_adapters())  # type: ignore[operator]
    warm = max(1, round(WARM_UP * task.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (task.steps - step) / (task.steps - warm + 1))
    )
    training_mode(model)
    losses, start = [], time.process_time()
    for step in range(task.steps):
        loss = loss_of(task, method, model, next(stream))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        if steps_itself:
            model.update_and_allocate(step)  # type: ignore[operator]
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    # The processor's own clock: on a machine that others use as well, a wall clock measures them.
    taken = (time.process_time() - start) * 1e3 / task.steps
    last = losses[-max(1, task.steps // 10) :]
    return taken, sum(last) / len(last)


def loss_of(task: Task, method: Method, model: nn.Module, batch: Batch) -> Tensor:
    """Return the training loss of one batch, with R-Drop on its rows run twice."""
    if method.r_drop is None:
        return task.loss(model, batch)
    names, twice = list(batch), rdrop_repeat(*batch.values())
    doubled = dict(zip(names, twice, strict=True))
    labels = doubled.pop("labels")
    loss: Tensor = RDropLoss(method.r_drop)(model(**doubled).logits, labels)
    return loss


def training_mode(model: nn.Module) -> None:
    """Set training mode, but let batch norms keep the statistics they were trained with."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def score(task: Task, model: nn.Module, held_out: Sequence[Batch]) -> float:
    model.eval()
    with torch.no_grad():
        return task.score(model, held_out)


def batches(task: Task, examples: list[Example], seed: int) -> Iterator[Batch]:
    """Yield batches without end; every example once in each pass, in an order that only the seed decides."""
    order = random.Random(seed)
    size = min(task.batch_size, len(examples))
    while True:
        shuffled = order.sample(examples, len(examples))
        pools = [shuffled[i : i + size * task.pool] for i in range(0, len(shuffled), size * task.pool)]
        ordered = [example for pool in pools for example in sorted(pool, key=task.length)]
        groups = [ordered[i : i + size] for i in range(0, len(ordered) - size + 1, size)]
        order.shuffle(groups)
        yield from map(task.batch, groups)


def _in_batches(task: Task, examples: list[Example], size: int = 64) -> list[Batch]:
    ordered = sorted(examples, key=task.length)
    return [task.batch(ordered[i : i + size]) for i in range(0, len(ordered), size)]
