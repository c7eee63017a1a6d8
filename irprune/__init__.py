"""irprune: a compiler for structural pruning of neural networks."""

__version__ = "0.1.0"
