"""Whose line it was: the place in the user's model that an error comes from."""

from __future__ import annotations

import inspect
import os
import re
import sysconfig
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

import torch

_LIBRARIES = tuple(f"{path}{os.sep}" for path in (Path(torch.__file__).parent, Path(__file__).parents[1]))
_STDLIB = sysconfig.get_path("stdlib") + os.sep


def definition(module: torch.nn.Module) -> str | None:
    """``file:line`` of a model's ``forward``."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None and is_users(code.co_filename) else None


def first_line(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0].partition(" (unhinted:")[0].strip()
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def innermost(frames: Iterable[tuple[FrameType, int]], *, reverse: bool = False) -> str | None:
    """``file:line`` of the user's frame that is nearest to where the frames end.

    Args:
        frames: Frames with their lines, the outermost first.
        reverse: The innermost comes first.
    """
    places = (f"{frame.f_code.co_filename}:{line}" for frame, line in frames if is_users(frame.f_code.co_filename))
    if reverse:
        return next(places, None)
    return next(iter(deque(places, maxlen=1)), None)


def is_users(filename: str) -> bool:
    if filename.startswith(("<", *_LIBRARIES)):
        return False
    return "site-packages" in filename or not filename.startswith(_STDLIB)


def last_line(text: str | None) -> str | None:
    """``file:line`` of the last place in a printed stack that is the user's."""
    places = re.findall(r'File "([^"]+)", line (\d+)', text or "")
    return next((f"{file}:{line}" for file, line in reversed(places) if is_users(file)), None)
