"""Finding the places in a model that a configuration names, and setting an adapter in."""
