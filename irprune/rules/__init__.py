"""Op rules: one function per operation relates its operands' axes to its results' axes."""

from __future__ import annotations

import importlib

FAMILIES = ("pointwise", "shape", "linear", "convolution", "attention", "norm", "reduction", "indexing", "recurrent")


def register_all() -> None:
    """Register the built-in rules."""
    for family in FAMILIES:
        importlib.import_module(f"irprune.rules.{family}")
