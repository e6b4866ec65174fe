"""What stands in front of a model's inputs: virtual tokens before the embeddings, virtual keys and values in the attention."""
