"""What the user names on the command line: a model file or a Hugging Face model."""

from __future__ import annotations

import importlib
from typing import Any

from pydantic import ValidationError

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
        **options: Of ``hf:`` targets, as :class:`irprune.frontend.huggingface.Options` has them.

    Returns:
        The untyped program and the lasting facts about it, the :class:`~irprune.ir.facts.Task` among them.

    Raises:
        TargetError, TraceError, DataError: See the two frontends.
        OptionError: There is no such option, or its value is out of its range.
    """
    result: tuple[Program, tuple[Fact, ...]]
    if not target.startswith(PREFIX):
        if options:
            raise OptionError(f"unknown target option '{next(iter(options))}'", hint="model files take no options")
        result = importlib.import_module("irprune.frontend.model_file").load(target, calibration=calibration, seed=seed)
        return result
    huggingface = importlib.import_module("irprune.frontend.huggingface")
    try:
        chosen = huggingface.Options(**options)
    except ValidationError as error:
        raise _refused(error, huggingface.Options) from None
    result = huggingface.load(target, calibration=calibration, seed=seed, options=chosen)
    return result


def _refused(error: ValidationError, options: Any) -> OptionError:
    """The first finding of pydantic as one sentence."""
    finding = error.errors()[0]
    name = str(finding["loc"][0])
    if name not in options.model_fields:
        return OptionError(f"unknown target option '{name}'", hint=f"hf: targets take {', '.join(options.model_fields)}")
    wanted = finding["msg"][0].lower() + finding["msg"][1:]
    return OptionError(f"target option '{name}' is {finding['input']!r}: {wanted}", hint=options.model_fields[name].description)
