"""The passes ``prune`` and ``apply``: choose what goes, remove it, prove the result."""

from irprune_passes.prune.apply import Apply
from irprune_passes.prune.prune import Prune

__all__ = ["Apply", "Prune"]
