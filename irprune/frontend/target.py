"""What the user names on the command line: a model file or a Hugging Face model."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from irprune.errors import OptionError
from irprune.ir.facts import Fact
from irprune.ir.program import Program

PREFIX = "hf:"


def load(target: str, *, calibration: str | None = None, seed: int = 0, **options: Any) -> tuple[Program, tuple[Fact, ...]]:
    """Trace a target.

    Args:
        target: Path of a model file, or ``hf:`` with a checkpoint's path or hub id.
        calibration: File of calibration data in place of the target's own.
        seed: Seed of everything random.
        **options: For ``hf:`` targets, those of :func:`irprune.frontend.huggingface.load`.

    Returns:
        The untyped program and the lasting facts about it, the :class:`~irprune.ir.facts.Task` among them.

    Raises:
        TargetError, TraceError, DataError: See the two frontends.
        OptionError: The frontend has no such option.
    """
    if target.startswith(PREFIX):
        frontend = importlib.import_module("irprune.frontend.huggingface").load
    else:
        frontend = importlib.import_module("irprune.frontend.model_file").load
    known = [name for name in inspect.signature(frontend).parameters if name not in ("target", "calibration", "seed")]
    for name in options:
        if name not in known:
            kind = "hf: targets take" if known else "model files take no options; hf: targets do"
            raise OptionError(f"unknown target option '{name}'", hint=f"{kind} {', '.join(known)}".rstrip())
    result: tuple[Program, tuple[Fact, ...]] = frontend(target, calibration=calibration, seed=seed, **options)
    return result
