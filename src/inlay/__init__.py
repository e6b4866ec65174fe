"""Inlay: parameter-efficient fine-tuning. A few trained numbers set into a frozen model.

The names are those of Hugging Face PEFT; each is imported when it is first asked for, so ``import inlay`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "adapted_model": "AdaptedModel",
    "auto": "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering "
    "AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification",
    "composition": "Average BatchSplit Fuse Parallel Split Stack",
    "files.checkpoint": "get_peft_model_state_dict load_peft_weights set_peft_model_state_dict",
    "config": "PeftConfig PeftType TaskType",
    "errors": "AdapterFileError NoMatchingPeftModuleError PeftError PeftWarning",
    "layers.extras": "ModulesToSaveWrapper TrainableTokensWrapper",
    "inits": "EvaConfig LoftQConfig",
    "inits.eva": "get_eva_state_dict initialize_lora_eva_weights",
    "inits.loftq_replace": "replace_lora_weights_loftq",
    "input_method": "InputMethod",
    "kbit": "prepare_model_for_kbit_training",
    "layers.layer": "AdaptedLayer",
    "method": "METHODS Method Slot",
    "methods.adalora.config": "AdaLoraConfig",
    "methods.bitfit": "BitFitConfig",
    "methods.bottleneck.config": "BottleneckConfig",
    "methods.bottleneck.families": "Family Points register_family",
    "methods.fusion": "FusionConfig",
    "methods.ia3": "IA3Config",
    "methods.ln_tuning": "LNTuningConfig",
    "methods.loha": "LoHaConfig",
    "methods.lokr": "LoKrConfig",
    "methods.lora": "LoraConfig LoraRuntimeConfig",
    "methods.oft": "OFTConfig",
    "methods.p_tuning": "PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType",
    "methods.prefix_tuning": "PrefixEncoder PrefixTuningConfig",
    "methods.prompt_tuning": "PromptEmbedding PromptTuningConfig PromptTuningInit",
    "methods.reft.config": "ReftConfig",
    "methods.shira": "ShiraConfig",
    "methods.trainable_tokens": "TrainableTokensConfig",
    "methods.vera": "VeraConfig",
    "peft_model": "PeftModel",
    "prompts.config": "PromptLearningConfig",
    "ranks": "draw_ranks rank_report write_rank_report",
    "methods.shira.calibration": "calibrate_shira",
    "methods.shira.overlap": "MaskOverlap ShiraOverlap shira_overlap",
    "status": "get_layer_status get_model_status",
    "tasks": "PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM "
    "PeftModelForSequenceClassification PeftModelForTokenClassification get_peft_model inject_adapter_in_model",
    "training.adapter_drop": "AdapterDropCallback",
    "training.freezing": "FreezeReport freeze_delta freeze_from_config freeze_modules",
    "training.r_drop": "RDropLoss rdrop_repeat",
    "training.trainable_checkpoint": "TrainableParamsCheckpoint",
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names.split()}
_ALIASES = {
    "AdaLoraModel": "AdaptedModel",
    "IA3Model": "AdaptedModel",
    "LNTuningModel": "AdaptedModel",
    "LoHaModel": "AdaptedModel",
    "LoKrModel": "AdaptedModel",
    "LoraModel": "AdaptedModel",
    "OFTModel": "AdaptedModel",
    "ShiraModel": "AdaptedModel",
    "VeraModel": "AdaptedModel",
    "LoraLayer": "AdaptedLayer",
    "BaseTuner": "AdaptedModel",
    "BaseTunerLayer": "AdaptedLayer",
}
"""Names of PEFT for what is one class here."""

_PACKAGES = ("mindpet",)
"""Packages of names of their own, imported when first asked for."""

__all__ = ["__version__", *sorted(_MODULE_OF), *sorted(_ALIASES)]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f".{name}", __name__)
    target = _ALIASES.get(name, name)
    if target not in _MODULE_OF:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[target]}", __name__), target)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from .adapted_model import AdaptedModel as AdaptedModel
    from .auto import AutoPeftModel as AutoPeftModel
    from .auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from .auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from .auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from .auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from .auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from .auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from .composition import Average as Average
    from .composition import BatchSplit as BatchSplit
    from .composition import Fuse as Fuse
    from .composition import Parallel as Parallel
    from .composition import Split as Split
    from .composition import Stack as Stack
    from .config import PeftConfig as PeftConfig
    from .config import PeftType as PeftType
    from .config import TaskType as TaskType
    from .errors import AdapterFileError as AdapterFileError
    from .errors import NoMatchingPeftModuleError as NoMatchingPeftModuleError
    from .errors import PeftError as PeftError
    from .errors import PeftWarning as PeftWarning
    from .files.checkpoint import get_peft_model_state_dict as get_peft_model_state_dict
    from .files.checkpoint import load_peft_weights as load_peft_weights
    from .files.checkpoint import set_peft_model_state_dict as set_peft_model_state_dict
    from .inits import EvaConfig as EvaConfig
    from .inits import LoftQConfig as LoftQConfig
    from .inits.eva import get_eva_state_dict as get_eva_state_dict
    from .inits.eva import initialize_lora_eva_weights as initialize_lora_eva_weights
    from .inits.loftq_replace import replace_lora_weights_loftq as replace_lora_weights_loftq
    from .input_method import InputMethod as InputMethod
    from .kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from .layers.extras import ModulesToSaveWrapper as ModulesToSaveWrapper
    from .layers.extras import TrainableTokensWrapper as TrainableTokensWrapper
    from .layers.layer import AdaptedLayer as AdaptedLayer
    from .method import METHODS as METHODS
    from .method import Method as Method
    from .method import Slot as Slot
    from .methods.adalora.config import AdaLoraConfig as AdaLoraConfig
    from .methods.bitfit import BitFitConfig as BitFitConfig
    from .methods.bottleneck.config import BottleneckConfig as BottleneckConfig
    from .methods.bottleneck.families import Family as Family
    from .methods.bottleneck.families import Points as Points
    from .methods.bottleneck.families import register_family as register_family
    from .methods.fusion import FusionConfig as FusionConfig
    from .methods.ia3 import IA3Config as IA3Config
    from .methods.ln_tuning import LNTuningConfig as LNTuningConfig
    from .methods.loha import LoHaConfig as LoHaConfig
    from .methods.lokr import LoKrConfig as LoKrConfig
    from .methods.lora import LoraConfig as LoraConfig
    from .methods.lora import LoraRuntimeConfig as LoraRuntimeConfig
    from .methods.oft import OFTConfig as OFTConfig
    from .methods.p_tuning import PromptEncoder as PromptEncoder
    from .methods.p_tuning import PromptEncoderConfig as PromptEncoderConfig
    from .methods.p_tuning import PromptEncoderReparameterizationType as PromptEncoderReparameterizationType
    from .methods.prefix_tuning import PrefixEncoder as PrefixEncoder
    from .methods.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
    from .methods.prompt_tuning import PromptEmbedding as PromptEmbedding
    from .methods.prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from .methods.prompt_tuning import PromptTuningInit as PromptTuningInit
    from .methods.reft.config import ReftConfig as ReftConfig
    from .methods.shira import ShiraConfig as ShiraConfig
    from .methods.shira.calibration import calibrate_shira as calibrate_shira
    from .methods.shira.overlap import MaskOverlap as MaskOverlap
    from .methods.shira.overlap import ShiraOverlap as ShiraOverlap
    from .methods.shira.overlap import shira_overlap as shira_overlap
    from .methods.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
    from .methods.vera import VeraConfig as VeraConfig
    from .peft_model import PeftModel as PeftModel
    from .prompts.config import PromptLearningConfig as PromptLearningConfig
    from .ranks import draw_ranks as draw_ranks
    from .ranks import rank_report as rank_report
    from .ranks import write_rank_report as write_rank_report
    from .status import get_layer_status as get_layer_status
    from .status import get_model_status as get_model_status
    from .tasks import PeftModelForCausalLM as PeftModelForCausalLM
    from .tasks import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
    from .tasks import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
    from .tasks import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
    from .tasks import PeftModelForSequenceClassification as PeftModelForSequenceClassification
    from .tasks import PeftModelForTokenClassification as PeftModelForTokenClassification
    from .tasks import get_peft_model as get_peft_model
    from .tasks import inject_adapter_in_model as inject_adapter_in_model
    from .training.adapter_drop import AdapterDropCallback as AdapterDropCallback
    from .training.freezing import FreezeReport as FreezeReport
    from .training.freezing import freeze_delta as freeze_delta
    from .training.freezing import freeze_from_config as freeze_from_config
    from .training.freezing import freeze_modules as freeze_modules
    from .training.r_drop import RDropLoss as RDropLoss
    from .training.r_drop import rdrop_repeat as rdrop_repeat
    from .training.trainable_checkpoint import TrainableParamsCheckpoint as TrainableParamsCheckpoint

    AdaLoraModel = BaseTuner = IA3Model = LNTuningModel = LoHaModel = LoKrModel = LoraModel = OFTModel = (
        ShiraModel
    ) = VeraModel = AdaptedModel
    BaseTunerLayer = LoraLayer = AdaptedLayer
