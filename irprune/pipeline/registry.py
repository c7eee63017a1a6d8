"""The passes that exist: found by entry point, the built-in ones included."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from irprune.errors import OptionError
from irprune.pipeline.passes import Pass

GROUP = "irprune.passes"


def names() -> tuple[str, ...]:
    """The names of all registered passes, sorted; none is imported."""
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


def find(name: str, *, where: str | None = None) -> type[Pass]:
    """The pass class of a name.

    Args:
        name: The pass.
        where: Where the name was given, for the error.

    Raises:
        OptionError: There is no such pass, or the package that registers it cannot be loaded.
    """
    points = [point for point in entry_points(group=GROUP) if point.name == name]
    if not points:
        raise OptionError(f"there is no pass '{name}'; {suggestion(name, names())}", where=where, hint="`irprune passes` documents them")
    if len({point.value for point in points}) > 1:
        rivals = " and ".join(sorted(point.value for point in points))
        raise OptionError(f"pass '{name}' is registered twice: {rivals}", where=where, hint="uninstall one of the two packages")
    return _load(points[0], where)


def loadable() -> dict[str, type[Pass]]:
    """Every registered pass that can be imported, by name; a broken third-party package is passed over."""
    found = {}
    for name in names():
        try:
            found[name] = find(name)
        except OptionError:
            continue
    return found


def suggestion(word: str, known: Iterable[str]) -> str:
    """The nearest match, where there is one, and the list of what exists."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return (f"did you mean '{near[0]}'? " if near else "") + ("known: " + ", ".join(known) if known else "it has no options")


def _load(point: EntryPoint, where: str | None) -> type[Pass]:
    hint = "repair or uninstall the package that registers it"
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        raise OptionError(f"pass '{point.name}' ({point.value}) cannot be loaded: {error}", where=where, hint=hint) from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise OptionError(f"pass '{point.name}' ({point.value}) is not a subclass of irprune.pipeline.passes.Pass", where=where, hint=hint)
    return found
