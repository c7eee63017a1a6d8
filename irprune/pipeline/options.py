"""Options of passes: from untyped values to a pass, and what an option allows, in words.

Pipeline text and TOML both come through :func:`build`, so they mean the same and fail the same.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from irprune.errors import OptionError
from irprune.pipeline import registry
from irprune.pipeline.passes import Pass, options


class Word(str):
    """A bare word of a pipeline text that could also be read as a number, truth value or nothing.

    Attributes:
        value: What it reads as.
    """

    value: Any

    def __new__(cls, text: str, value: Any) -> Word:
        word = super().__new__(cls, text)
        word.value = value
        return word


def build(name: str, values: Mapping[str, Any], *, where: str | None = None, places: Mapping[str, str] | None = None) -> Pass:
    """A pass from its name and option values.

    A :class:`Word` is first taken for what it reads as, and for its text where the option takes no
    such value (``norm=none`` of an option that knows the word "none").

    Args:
        name: A registered pass.
        values: Option values as a text or a TOML file gives them.
        where: Where the pass was named, for errors.
        places: Where each option was named.

    Raises:
        OptionError: No such pass or option, or a value that is not allowed.
    """
    cls = registry.find(name, where=where)
    try:
        return cls.model_validate({key: _read(value) for key, value in values.items()})
    except ValidationError as error:
        wrong = {str(finding["loc"][0]) for finding in error.errors() if finding["loc"]}
        texts = {key: _text(value) if key in wrong else _read(value) for key, value in values.items()}
        try:
            return cls.model_validate(texts)
        except ValidationError:
            raise _translated(cls, error, where, places or {}) from None


def _read(value: Any) -> Any:
    if isinstance(value, Word):
        return value.value
    return [_read(item) for item in value] if isinstance(value, list) else value


def _text(value: Any) -> Any:
    return [_text(item) for item in value] if isinstance(value, list) else str(value) if isinstance(value, Word) else value


def _translated(cls: type[Pass], error: ValidationError, where: str | None, places: Mapping[str, str]) -> OptionError:
    """The first finding of pydantic as one sentence: pass, option, value, what is allowed."""
    finding = error.errors()[0]
    option = str(finding["loc"][0]) if finding["loc"] else ""
    place = places.get(option, where)
    hint = f"`irprune passes {cls.name}` documents its options"
    known = options(cls)
    if finding["type"] == "extra_forbidden":
        return OptionError(f"pass '{cls.name}' has no option '{option}'; {registry.suggestion(option, known)}", where=place, hint=hint)
    if finding["type"] == "missing":
        text = f"pass '{cls.name}' needs a value for option '{option}': {allowed(known[option])}"
        return OptionError(text, where=place, hint=hint)
    reason = str(finding["ctx"]["error"]) if finding["type"] == "value_error" else ""
    if not option:
        return OptionError(f"pass '{cls.name}': {reason or finding['msg']}", where=place, hint=hint)
    text = f"pass '{cls.name}', option '{option}': {finding['input']!r} is not allowed; {reason or 'it takes ' + allowed(known[option])}"
    return OptionError(text, where=place, hint=hint)


# -- what an option allows, in words ---------------------------------------------------------------


def allowed(field: FieldInfo) -> str:
    """What an option takes: ``a number, at least 0 and less than 1``."""
    return _allowed(field.annotation, field.metadata)


def default(field: FieldInfo) -> str:
    """The default as it would be written in a pipeline text, or ``required``."""
    from irprune.pipeline.parser import write

    return "required" if field.is_required() else write(field.get_default(call_default_factory=True))


_NOUNS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    types.NoneType: "none",
}
_BOUNDS: tuple[tuple[type, str, str], ...] = (
    (annotated_types.Ge, "ge", "at least"),
    (annotated_types.Gt, "gt", "more than"),
    (annotated_types.Le, "le", "at most"),
    (annotated_types.Lt, "lt", "less than"),
    (annotated_types.MultipleOf, "multiple_of", "a multiple of"),
)


def _allowed(annotation: Any, metadata: list[Any]) -> str:
    bounds = [f"{words} {getattr(item, name)}" for kind, name, words in _BOUNDS for item in _flat(metadata) if isinstance(item, kind)]
    counts = [item for item in _flat(metadata) if isinstance(item, annotated_types.MinLen) and item.min_length]
    text = _noun(annotation)
    patterns = [item.pattern for item in _flat(metadata) if getattr(item, "pattern", None)]
    if patterns:
        text += f" that fits {patterns[0]}"
    if bounds:
        text += ", " + " and ".join(bounds)
    if counts:
        text += f", with {counts[0].min_length} or more of them" if get_origin(annotation) in (tuple, list) else ", not empty"
    return text


def _flat(metadata: list[Any]) -> list[Any]:
    out: list[Any] = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            out.extend(_flat(item.metadata))
        else:
            out.extend(item if isinstance(item, annotated_types.GroupedMetadata) else [item])
    return out


def _noun(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(args[0], list(args[1:]))
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in args) if len(args) > 1 else f"'{args[0]}'"
    if origin in (Union, types.UnionType):
        return " or ".join(_noun(arg) for arg in args)
    if origin in (tuple, list, set, frozenset):
        if origin is tuple and args[-1] is not Ellipsis:
            return "a list of " + ", ".join(_noun(arg) for arg in args)
        return f"a list, each item {_noun(args[0])}"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "one of " + ", ".join(str(choice.value) for choice in annotation)
    return _NOUNS.get(annotation, getattr(annotation, "__name__", str(annotation)))
