"""The exceptions and warnings of Inlay. Names and base classes follow Hugging Face PEFT 0.21."""

from __future__ import annotations


class PeftError(Exception):
    """Base of all errors that are particular to parameter-efficient fine-tuning."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """No module of the model is named by the configuration."""


class AdapterFileError(PeftError, RuntimeError):
    """A saved adapter is truncated, does not belong to this model, or is no adapter at all.

    It is a ``RuntimeError`` because that is what ``nn.Module.load_state_dict`` and PEFT raise.
    """


class PeftWarning(UserWarning):
    """Base of all warnings that Inlay gives."""
