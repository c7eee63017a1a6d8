"""A page per pass, made from its pydantic model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from irprune.ir.facts import Fact
from irprune.pipeline.options import allowed, default
from irprune.pipeline.passes import Pass, options
from irprune.report.tables import table_of


@dataclass(frozen=True)
class Option:
    """One option of a pass, in words."""

    name: str
    takes: str
    default: str
    description: str


def option_list(of: type[Pass]) -> list[Option]:
    """The options of a pass in the order of its model."""
    return [Option(name, allowed(field), default(field), field.description or "") for name, field in options(of).items()]


def summary(of: type[Pass]) -> str:
    """The first line of a pass's docstring."""
    return doc(of).partition("\n")[0]


def doc(of: type[Pass]) -> str:
    """A pass's docstring without indentation."""
    return inspect.getdoc(of) or ""


def facts(kinds: Iterable[type[Fact]]) -> str:
    """Names of facts, or ``nothing``."""
    return ", ".join(kind.__name__ for kind in kinds) or "nothing"


def contract(of: type[Pass]) -> dict[str, str]:
    """What a pass reads and returns, in words."""
    out = {"needs": facts(of.needs), "uses": facts(of.uses), "gives": facts((*of.gives, *of.may_give))}
    return {**out, "changes": "the program" if of.changes else "nothing"}


def listing(passes: Iterable[type[Pass]]) -> Table:
    """Name, first line, and what each reads and gives."""
    table = table_of("pass", "", "needs", "gives")
    for one in passes:
        told = contract(one)
        table.add_row(one.name, escape(summary(one)), told["needs"], told["gives"])
    return table


def page(of: type[Pass]) -> list[str | Table]:
    """The page of a pass for a terminal."""
    out: list[str | Table] = [escape(f"{of.name}: {doc(of)}"), ""]
    out += [f"{label}: {told}" for label, told in contract(of).items()]
    rows = option_list(of)
    if rows:
        table = table_of("option", "takes", "default", "")
        for row in rows:
            table.add_row(row.name, escape(row.takes), escape(row.default), escape(row.description))
        out.append(table)
    return out


def markdown(of: type[Pass]) -> str:
    """The page of a pass."""
    return "\n".join(_markdown(of)) + "\n"


def _markdown(of: type[Pass]) -> Iterator[str]:
    yield f"# {of.name}"
    yield ""
    yield from _prose(doc(of))
    for label, told in contract(of).items():
        yield f"- {label}: {told}"
    rows = option_list(of)
    if rows:
        yield ""
        yield "| option | takes | default | |"
        yield "|---|---|---|---|"
        for row in rows:
            cells = (f"`{row.name}`", row.takes, f"`{row.default}`", row.description)
            yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _prose(text: str) -> Iterator[str]:
    """Docstring paragraphs as markdown: literal blocks and sections become code blocks and lists."""
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if lines[0].endswith("::") or "::  " in lines[0]:
            yield from ("```", *(line.replace("::", ":", 1).replace("``", "") for line in lines), "```", "")
        elif lines[0] == "Raises:":
            yield from ("Errors:", "", *(f"- {line.strip()}" for line in lines[1:]), "")
        else:
            yield from (line.replace("``", "`") for line in lines)
            yield ""
