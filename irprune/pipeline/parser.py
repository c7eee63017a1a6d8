"""Pipelines as text and as TOML.

The text is written in the manner of mlir-opt::

    pipeline := pass ("," pass)*
    pass     := NAME [ "{" (KEY "=" value)* "}" ]
    value    := number | true | false | none | word | "string" | "[" [value ("," value)*] "]"

Options are separated by blanks (a comma is accepted too); a string needs quotes only where it holds one
of ``, = { } [ ] " \\`` or a blank, or where it would read as a number. ``parse(str(p)) == [p]``.
The same pipeline in TOML has one table per pass::

    [[passes]]
    name = "prune"
    ratio = 0.2
"""

from __future__ import annotations

import enum
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from irprune.errors import OptionError
from irprune.pipeline.options import Word, build
from irprune.pipeline.passes import Pass, options

_TOKEN = re.compile(r"""(?P<blank>\s+)|(?P<mark>[,={}\[\]])|(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<bare>[^\s,={}\[\]"\\]+)""")
_NUMBER = re.compile(r"[+-]?(?:\d+|(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|inf|nan)")
_CONSTANTS: Mapping[str, Any] = {"true": True, "false": False, "none": None}
_BARE = re.compile(r"""[^\s,={}\[\]"\\]+""")


def parse(text: str) -> list[Pass]:
    """The passes of a pipeline text.

    Raises:
        OptionError: The text is not a pipeline, or names a pass, an option or a value that does not
            exist or is not allowed; the error names the place.
    """
    return _Parser(text).pipeline()


def parse_toml(path: str | Path) -> list[Pass]:
    """The passes of a TOML file.

    Raises:
        OptionError: As :func:`parse`, and where the file cannot be read.
    """
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"the pipeline file cannot be read: {error.strerror}", where=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"the pipeline file is not TOML: {error}", where=str(path)) from error
    hint = 'write one table [[passes]] per pass, with name = "..." and its options'
    tables = document.pop("passes", [])
    if document:
        raise OptionError(f"'{next(iter(document))}' is not known here; known: passes", where=str(path), hint=hint)
    if not (isinstance(tables, list) and tables and all(isinstance(table, dict) for table in tables)):
        raise OptionError("the pipeline file lists no passes", where=str(path), hint=hint)
    passes = []
    for number, table in enumerate(tables, 1):
        where = f"{path}, pass {number}"
        name = table.pop("name", None)
        if not isinstance(name, str):
            raise OptionError("the pass has no name", where=where, hint=hint)
        passes.append(build(name, table, where=where))
    return passes


def unparse(of: Pass | Iterable[Pass]) -> str:
    """The text form of a pass or a pipeline, with the options that differ from their defaults."""
    if not isinstance(of, Pass):
        return ",".join(unparse(one) for one in of)
    chosen = []
    for key, info in options(type(of)).items():
        value = getattr(of, key)
        if info.is_required() or write(value) != write(info.get_default(call_default_factory=True)):
            chosen.append(f"{key}={write(value)}")
    chosen += [f"{key}={write(value)}" for key, value in (of.model_extra or {}).items()]
    return of.name + ("{" + " ".join(chosen) + "}" if chosen else "")


def write(value: Any) -> str:
    """One option value as text."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return write(value.value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(write(item) for item in value) + "]"
    text = str(value)
    return text if _BARE.fullmatch(text) and not isinstance(_word(text), Word) else json.dumps(text, ensure_ascii=False)


def read(text: str) -> Any:
    """One bare word as the number, truth value, nothing or text that it is."""
    word = _word(text)
    return word.value if isinstance(word, Word) else text


def _word(text: str) -> str:
    """A bare word, with what else it could be read as."""
    if text in _CONSTANTS:
        return Word(text, _CONSTANTS[text])
    if _NUMBER.fullmatch(text):
        return Word(text, int(text) if text.lstrip("+-").isdecimal() else float(text))
    return text


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    offset: int


@dataclass
class _Parser:
    text: str
    tokens: list[_Token] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = []
        offset = 0
        while offset < len(self.text):
            match = _TOKEN.match(self.text, offset)
            if match is None:
                self.fail("this quoted string does not end" if self.text[offset] == '"' else "a backslash needs quotes around it", offset)
            assert match.lastgroup is not None
            if match.lastgroup != "blank":
                self.tokens.append(_Token(match.lastgroup, match.group(), offset))
            offset = match.end()
        self.tokens.append(_Token("end", "the end of the text", len(self.text)))
        self.tokens.reverse()

    def pipeline(self) -> list[Pass]:
        passes = [self.one_pass()]
        while self.accept(","):
            passes.append(self.one_pass())
        if self.peek.kind != "end":
            self.unexpected("',' and the next pass")
        return passes

    def one_pass(self) -> Pass:
        name = self.expect("bare", "the name of a pass")
        values: dict[str, Any] = {}
        places: dict[str, str] = {}
        if self.accept("{"):
            while not self.accept("}"):
                key = self.expect("bare", "an option or '}'")
                if key.text in values:
                    self.fail(f"option '{key.text}' of pass '{name.text}' is given twice", key.offset)
                if not self.accept("="):
                    self.unexpected(f"'=' after option '{key.text}'")
                places[key.text] = self.place(key.offset)
                values[key.text] = self.value()
                self.accept(",")
        return build(name.text, values, where=self.place(name.offset), places=places)

    def value(self) -> Any:
        if self.accept("["):
            items: list[Any] = []
            while not self.accept("]"):
                items.append(self.value())
                if self.peek.text != "]" and not self.accept(","):
                    self.unexpected("',' or ']'")
            return items
        token = self.peek
        if token.kind == "quoted":
            try:
                text = json.loads(self.tokens.pop().text, strict=False)
            except json.JSONDecodeError:
                self.fail(f"{token.text} holds an unknown escape", token.offset)
            return text
        return _word(self.expect("bare", "a value").text)

    @property
    def peek(self) -> _Token:
        return self.tokens[-1]

    def accept(self, mark: str) -> bool:
        if self.peek.kind == "mark" and self.peek.text == mark:
            self.tokens.pop()
            return True
        return False

    def expect(self, kind: str, wanted: str) -> _Token:
        if self.peek.kind != kind:
            self.unexpected(wanted)
        return self.tokens.pop()

    def unexpected(self, wanted: str) -> NoReturn:
        found = self.peek.text if self.peek.kind == "end" else f"'{self.peek.text}'"
        self.fail(f"expected {wanted}, found {found}", self.peek.offset)

    def place(self, offset: int) -> str:
        line = self.text.count("\n", 0, offset)
        column = offset - (self.text.rfind("\n", 0, offset) + 1) + 1
        return f"pipeline text, {f'line {line + 1}, ' if line else ''}column {column}"

    def fail(self, message: str, offset: int) -> NoReturn:
        raise OptionError(message, where=self.place(offset), hint="a pipeline reads `name{key=value key=value},name`")
