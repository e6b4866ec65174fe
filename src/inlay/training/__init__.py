"""Training with adapters: glue to existing engines and tools for selective training."""
