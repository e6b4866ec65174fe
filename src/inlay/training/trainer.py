"""Let transformers' ``Trainer`` treat Inlay's ``PeftModel`` as it treats PEFT's.

The Trainer asks ``isinstance(model, PeftModel)`` in order to save adapters instead of whole models, to resume them, to load
the best one, and to find the label names of the base model. Without an answer it would write the frozen base model into every
checkpoint. There is no hook for other libraries, so the names it asks by are changed when a ``PeftModel`` is made, or when the
Trainer is imported after that: the function ``_is_peft_model`` wherever transformers holds it, and ``PeftModel`` in the Trainer's
module, which becomes a tuple of classes. PEFT's own models are recognised as before.

Loading is not left to the Trainer: it would put the adapter "default" into whichever is active, and activate one where several
were, so a resumed run would be another one.

Methods that act after each optimizer step (AdaLoRA) are called by a callback that every Trainer of such a model gets.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import PeftWarning
from ..files.folder import adapter_folder
from .optimizer_state import note_optimizer

if TYPE_CHECKING:
    from ..peft_model import PeftModel

TRAINER = "transformers.trainer"


def teach_trainer(model_class: type[PeftModel]) -> None:
    """Make the Trainer recognise a class, now if it is imported already, else as soon as it is."""
    if TRAINER in sys.modules:
        _teach(sys.modules[TRAINER], model_class)
    elif not any(isinstance(finder, _TrainerImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TrainerImport(model_class))


def _teach(trainer: Any, model_class: type[PeftModel]) -> None:
    known = getattr(trainer, "PeftModel", ())  # absent where PEFT is
    known = known if isinstance(known, tuple) else (known,)
    if model_class in known:
        return
    original: Any = getattr(trainer, "_is_peft_model", None)
    names = ("_load_from_checkpoint", "_load_best_model", "_inner_training_loop")
    methods = [getattr(trainer.Trainer, name, None) for name in names]
    if None in (original, *methods):
        warnings.warn(
            "this version of transformers is not known to Inlay: its Trainer may save whole models instead of adapters",
            PeftWarning,
            stacklevel=4,
        )
        return

    def is_peft_model(model: Any) -> bool:
        return isinstance(model, model_class) or bool(original(model))

    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and vars(module).get("_is_peft_model") is original:
            vars(module)["_is_peft_model"] = is_peft_model
    trainer.PeftModel = (model_class, *known)
    if not known:
        trainer.is_peft_available = lambda *args, **kwargs: True  # or it would not look at PeftModel
    _load_own_adapters(trainer.Trainer, model_class)
    _let_adapters_step(trainer.Trainer)


def _load_own_adapters(trainer_class: Any, model_class: type[PeftModel]) -> None:
    resume, load_best = trainer_class._load_from_checkpoint, trainer_class._load_best_model

    def loaded(trainer: Any, folder: str) -> bool:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        if not isinstance(model, model_class) or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            return False
        if trainer.optimizer is not None:
            note_optimizer(trainer.optimizer)
        for name in model.peft_config:
            model.load_adapter(adapter_folder(folder, name), name)
        return True

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        if not loaded(self, resume_from_checkpoint):
            resume(self, resume_from_checkpoint, model)

    def _load_best_model(self: Any) -> None:
        if not loaded(self, self.state.best_model_checkpoint):
            load_best(self)

    trainer_class._load_from_checkpoint = _load_from_checkpoint
    trainer_class._load_best_model = _load_best_model


def _let_adapters_step(trainer_class: Any) -> None:
    train = trainer_class._inner_training_loop

    @wraps(train)
    def _inner_training_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        from .adapter_step import AdapterStepCallback, adapted_model

        present = any(isinstance(c, AdapterStepCallback) for c in self.callback_handler.callbacks)
        model = adapted_model(self.model)
        if not present and model is not None and any(m.steps() for m in model.methods.values()):
            self.add_callback(AdapterStepCallback())
        return train(self, *args, **kwargs)

    trainer_class._inner_training_loop = _inner_training_loop


class _TrainerImport(importlib.abc.MetaPathFinder):
    """Waits for the Trainer to be imported, teaches it, and is gone."""

    def __init__(self, model_class: type[PeftModel]) -> None:
        self.model_class = model_class

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TRAINER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _teach(module, self.model_class)
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
