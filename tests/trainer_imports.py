"""Run by ``test_trainer``: does the Trainer know Inlay's models, with and without PEFT, imported before or after them?

Each case is a fork of this process, so the expensive imports that they share are done once.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (imported here, before the forks)
import datasets  # noqa: F401
import transformers.modeling_utils
import transformers.utils.import_utils
from torch import Tensor, nn

import inlay


class Model(nn.Module):
    """Any model: the Trainer asks for no more than a loss, and names ending in "label" or "labels"."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor, goal_labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": self.layer(x).sum()}


def adapted(library: Any) -> Any:
    return library.get_peft_model(Model(), library.LoraConfig(target_modules=["layer"]))


def saved_by_trainer(model: nn.Module, root: str) -> tuple[list[str], list[str]]:
    """Return the label names that the Trainer finds and the files of weights that it writes."""
    folder = Path(tempfile.mkdtemp(dir=root))
    arguments = transformers.TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
    trainer = transformers.Trainer(model, arguments)
    trainer.save_model()
    return trainer.label_names, sorted(path.name for path in folder.glob("*.safetensors"))


def check(peft_is_installed: bool, trainer_first: bool, root: str) -> None:
    assert not {"peft", "transformers.trainer", "transformers.trainer_utils"} & sys.modules.keys()
    if not peft_is_installed:
        for module in (transformers.utils, transformers.utils.import_utils):
            vars(module)["is_peft_available"] = lambda *args, **kwargs: False
    model = None if trainer_first else adapted(inlay)
    assert saved_by_trainer(Model(), root) == (["goal_labels"], ["model.safetensors"])
    model = adapted(inlay) if model is None else model
    assert saved_by_trainer(model, root) == (["goal_labels"], ["adapter_model.safetensors"])
    assert saved_by_trainer(Model(), root) == (["goal_labels"], ["model.safetensors"])
    assert "_TrainerImport" not in [type(finder).__name__ for finder in sys.meta_path]
    assert len(vars(sys.modules["transformers.trainer"])["PeftModel"]) == 1 + peft_is_installed
    if peft_is_installed:
        import peft

        assert saved_by_trainer(adapted(peft), root) == (["goal_labels"], ["adapter_model.safetensors"])


def main(root: str) -> int:
    failures = 0
    for case in ((True, False), (False, True), (False, False)):  # the fourth is the process of test_trainer
        child = os.fork()
        if child == 0:
            status = 1
            try:
                check(*case, root)
                status = 0
            except BaseException:
                print(
                    f"peft installed, Trainer imported first: {case}", traceback.format_exc(), file=sys.stderr
                )
            finally:
                sys.stderr.flush()
                os._exit(status)
        failures += os.waitpid(child, 0)[1] != 0
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
