"""AdaLoRA under transformers' Trainer: nobody calls it, and it prunes; checkpoints in the middle of the schedule are resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import inlay
from inlay.files.folder import STATE_NAME
from inlay.training.adapter_step import AdapterStepCallback
from test_trainer import losses, same, trainer, values
from tiny_models import VOCABULARY, tiny

STEPS = 8


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (32, 6), generator=generator)
    return [{"input_ids": row, "labels": int(row[0]) % 3} for row in ids]


def classifier(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    plan: dict[str, Any] = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 3, "total_step": STEPS}
    config = inlay.AdaLoraConfig(task_type="SEQ_CLS", lora_dropout=0.1, **(plan | changes))
    return inlay.get_peft_model(tiny("bert_classifier"), config)


def total(model: Any) -> int:
    return sum(inlay.rank_report(model).values())


class Watching(tf.TrainerCallback):
    """Notes the sizes of what is trained and of what the optimizer remembers."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        remembered = sum(s["exp_avg"].numel() for s in kwargs["optimizer"].state.values())
        self.sizes.append((sum(p.numel() for p in model.parameters() if p.requires_grad), remembered))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_prunes_by_itself(accumulation: int, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    model, watching = classifier(), Watching()
    run = trainer(
        model, rows, tmp_path, max_steps=STEPS, save_steps=STEPS, callbacks=[watching],
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    run.train()
    assert total(model) == 2 * len(inlay.rank_report(model))
    assert sum(isinstance(c, AdapterStepCallback) for c in run.callback_handler.callbacks) == 1
    assert all(trained == remembered for trained, remembered in watching.sizes)
    assert len({size for size, _ in watching.sizes}) == 2  # once, at the last allocation
    assert watching.sizes[-1] < watching.sizes[0]
    loaded = inlay.PeftModel.from_pretrained(tiny("bert_classifier"), tmp_path / f"checkpoint-{STEPS}")
    assert same(values(loaded), values(model))


def test_a_callback_that_is_there_is_not_added_again(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    model = classifier()
    run = trainer(
        model, rows, tmp_path, max_steps=STEPS, save_strategy="no", callbacks=[AdapterStepCallback()]
    )
    run.train()
    assert sum(isinstance(c, AdapterStepCallback) for c in run.callback_handler.callbacks) == 1
    assert total(model) == 2 * len(inlay.rank_report(model))
    lora = inlay.get_peft_model(tiny("bert_classifier"), inlay.LoraConfig(task_type="SEQ_CLS"))
    other = trainer(lora, rows, tmp_path, max_steps=1, save_strategy="no")
    other.train()
    assert not any(isinstance(c, AdapterStepCallback) for c in other.callback_handler.callbacks)


def test_an_injected_adapter_is_pruned_as_well(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    classifier()  # from now on the Trainer knows Inlay
    config = inlay.AdaLoraConfig(init_r=4, target_r=2, total_step=STEPS, target_modules=["query", "value"])
    model = inlay.inject_adapter_in_model(config, tiny("bert_classifier"))
    trainer(model, rows, tmp_path, max_steps=STEPS, save_strategy="no").train()
    assert total(model) == 2 * 4


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_resumed_run_is_the_same_run(stop: int, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """Checkpoints from before, at and after the last allocation, which is in step 5 counted from zero."""
    whole = trainer(classifier(), rows, tmp_path, max_steps=STEPS, save_steps=1)
    whole.train()
    folder = tmp_path / f"checkpoint-{stop}"
    assert (folder / STATE_NAME).exists() == (stop <= 5)
    resumed = trainer(classifier(seed=7), rows, tmp_path / "resumed", max_steps=STEPS)
    resumed.train(resume_from_checkpoint=str(folder))
    assert same(values(whole.model), values(resumed.model))
    assert losses(whole) == losses(resumed)
    assert inlay.rank_report(whole.model) == inlay.rank_report(resumed.model)


def test_an_optimizer_given_to_the_trainer_follows_a_resumed_adapter(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    def prepared(seed: int, steps: int) -> tuple[Any, Any, Any]:
        model = classifier(seed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        return model, optimizer, trainer(model, rows, tmp_path, max_steps=steps, optimizers=(optimizer, None))

    prepared(0, STEPS)[2].train()
    model, optimizer, run = prepared(7, STEPS + 2)
    run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(
        s["exp_avg"].shape == p.shape and int(s["step"]) == STEPS + 2 for p, s in optimizer.state.items()
    )


def test_the_best_adapter_may_have_other_ranks(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    model = classifier()
    scores = iter([0.1, 0.9, 0.5, 0.4])
    run = trainer(
        model, rows, tmp_path, max_steps=STEPS, save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="score", compute_metrics=lambda _: {"score": next(scores)},
    )  # fmt: skip
    run.train()
    best = inlay.PeftModel.from_pretrained(tiny("bert_classifier"), tmp_path / "checkpoint-4")
    assert same(values(best), values(model))


def test_a_run_that_is_too_short_is_told(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    for steps, plan in ((5, {}), (7, {"tfinal": 0})):
        with pytest.warns(
            inlay.PeftWarning, match=rf"the run has {steps} optimizer steps.*set total_step={steps}"
        ):
            trainer(classifier(**plan), rows, tmp_path, max_steps=steps, save_strategy="no").train()
    model = classifier(tfinal=0)
    trainer(model, rows, tmp_path, max_steps=STEPS, save_strategy="no").train()
    assert total(model) == 2 * len(inlay.rank_report(model))
