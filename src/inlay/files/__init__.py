"""Adapters in folders and on the hub: PEFT's format both ways."""
