"""Let transformers' ``Trainer`` treat Inlay's ``PeftModel`` as it treats PEFT's.

The Trainer asks ``isinstance(model, peft.PeftModel)`` in order to save adapters instead of whole models, to resume them, to
load the best one, and to find the label names of the base model. Without an answer it would write the frozen base model into
every checkpoint. There is no hook for other libraries, so two names are replaced in ``transformers.trainer`` (and one in
``transformers.trainer_utils``) when a ``PeftModel`` is made, or when the Trainer is imported after that. Nothing else of
transformers is touched, and PEFT's own models are recognised as before.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

TRAINER = "transformers.trainer"


def teach_trainer(model_class: type) -> None:
    """Make the Trainer recognise a class, now if it is imported already, else as soon as it is."""
    if TRAINER in sys.modules:
        _teach(sys.modules[TRAINER], model_class)
    elif not any(isinstance(finder, _TrainerImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TrainerImport(model_class))


def _teach(trainer: ModuleType, model_class: type) -> None:
    if getattr(trainer, "_inlay_model_class", None) is model_class:
        return
    names: Any = trainer
    names._inlay_model_class = model_class
    names._is_peft_model = _recognising(names._is_peft_model, model_class)
    utils = sys.modules.get("transformers.trainer_utils")
    if utils is not None and hasattr(utils, "_is_peft_model"):
        cast_utils: Any = utils
        cast_utils._is_peft_model = _recognising(cast_utils._is_peft_model, model_class)
    names.Trainer._save = _saving_adapters(names.Trainer._save, model_class)


def _recognising(original: Callable[[Any], bool], model_class: type) -> Callable[[Any], bool]:
    def is_peft_model(model: Any) -> bool:
        return isinstance(model, model_class) or original(model)

    return is_peft_model


def _saving_adapters(original: Callable[..., None], model_class: type) -> Callable[..., None]:
    """Wrap ``Trainer._save`` so that it writes the adapter and leaves the rest (tokenizer, arguments) to the original."""

    def _save(self: Any, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, model_class):
            return original(self, output_dir, state_dict)
        folder = output_dir if output_dir is not None else self.args.output_dir
        model.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save)  # type: ignore[attr-defined]
        if self.args.should_save:
            import os

            import torch

            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, "training_args.bin"))
        return None

    return _save


class _TrainerImport(importlib.abc.MetaPathFinder):
    """Waits for the Trainer to be imported, teaches it, and is gone."""

    def __init__(self, model_class: type) -> None:
        self.model_class = model_class

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader, model_class = spec.loader, self.model_class
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _teach(module, model_class)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
