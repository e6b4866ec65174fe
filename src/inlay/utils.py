"""``peft.utils`` for scripts that import from there."""

from .config import CONFIG_NAME, PeftType, TaskType
from .files.checkpoint import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from .files.folder import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from .injection.targets import DEFAULT_TARGETS as TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from .kbit import prepare_model_for_kbit_training
from .layers.extras import ModulesToSaveWrapper, TrainableTokensWrapper

__all__ = [
    "CONFIG_NAME",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "WEIGHTS_NAME",
    "ModulesToSaveWrapper",
    "PeftType",
    "TaskType",
    "TrainableTokensWrapper",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]
