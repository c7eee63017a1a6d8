"""The pass ``recover``: train what is trainable."""

from irprune_passes.recover.recover import Recover

__all__ = ["Recover"]
