"""irprune: a compiler for structural pruning of neural networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["groups", "load", "load_pretrained", "run", "trace", "validate"]

if TYPE_CHECKING:
    from irprune.api import groups, load, load_pretrained, run, trace, validate


def __getattr__(name: str) -> Any:
    """The functions of :mod:`irprune.api`, imported when they are asked for: torch takes a while."""
    if name in __all__:
        from irprune import api

        return getattr(api, name)
    raise AttributeError(f"module 'irprune' has no attribute '{name}'")
