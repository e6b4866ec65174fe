"""What ``benchmarks/activations.py`` measures: models, methods of three libraries, and a process for the third."""
