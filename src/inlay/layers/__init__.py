"""The wrappers that stand where a model's layers stood, and what hangs beside them."""
