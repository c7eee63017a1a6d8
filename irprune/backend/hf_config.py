"""The Hugging Face configuration of a pruned model, from its shapes.

Shapes come first: :class:`Sizes` says of every axis what its factors were and are. Names come second: a
table of data (``hf_fields.toml``) says for some model types which field of the configuration is which
size; for the others fields are tried. Whatever is found, the class built from it must have the pruned
shapes, and the caller compares outputs.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from irprune.analysis.groups import discover
from irprune.backend.checkpoint import Recipe, shapes
from irprune.ir.dims import Concat, Mask, Term, Var, atom_size, kept_size, resolve
from irprune.ir.program import Program
from irprune.pipeline.progress import track
from irprune.rules.infer import typed

Shape = tuple[int, ...]
Factors = tuple[tuple[int, int], ...]
Place = tuple[str, str]
Updates = dict[str, Any]

_MOST_PAIRS = 200


@dataclass(frozen=True)
class Sizes:
    """What the axes of a model's tensors were and are.

    Attributes:
        old: Name to shape before, under the names of the smaller model.
        new: Name to shape after.
        factors: ``(name, "axis" or "axis/block")`` to the ``(old, new)`` sizes of its factors, major first.
    """

    old: Mapping[str, Shape]
    new: Mapping[str, Shape]
    factors: Mapping[Place, Factors] = field(default_factory=dict)

    @classmethod
    def between(cls, old: Mapping[str, Shape], new: Mapping[str, Shape], known: Mapping[Place, Factors] | None = None) -> Sizes:
        """Sizes of tensors that both have; factors that are not known, or are not those of the shapes, are whole axes."""
        both = [name for name in new if name in old and len(old[name]) == len(new[name])]
        factors: dict[Place, Factors] = {}
        for name in both:
            for axis, pair in enumerate(zip(old[name], new[name], strict=True)):
                found = (known or {}).get((name, str(axis)), ())
                fits = (math.prod(a for a, _ in found), math.prod(b for _, b in found)) == pair
                factors[name, str(axis)] = found if found and fits else (pair,)
                for block in itertools.count():
                    inner = (known or {}).get((name, f"{axis}/{block}"))
                    if inner is None:
                        break
                    factors[name, f"{axis}/{block}"] = inner
        return cls({name: old[name] for name in both}, {name: new[name] for name in both}, factors)

    @property
    def changed(self) -> list[str]:
        return [name for name in self.new if self.old[name] != self.new[name]]

    def readings(self, names: Iterable[str] | None = None) -> Iterator[tuple[Place, int, int, int, int]]:
        """Every run of neighbouring factors: ``(place, first, last, old, new)``."""
        wanted = None if names is None else set(names)
        for place, factors in self.factors.items():
            if wanted is None or place[0] in wanted:
                for first, last in itertools.combinations(range(len(factors) + 1), 2):
                    run = factors[first:last]
                    yield place, first, last, math.prod(a for a, _ in run), math.prod(b for _, b in run)


def factors_of(original: Program, keep: Mapping[str, Mask]) -> dict[Place, Factors]:
    """The factors of every axis of a program before and after a recipe.

    Args:
        original: The program that the recipe is for.
        keep: Group key to keep mask.
    """
    original = original if original.types is not None else typed(original)
    masks = Recipe(keep, shapes(original)).masks(original, discover(original)) if keep else {}
    counts = {var: int(mask.sum()) for var, mask in masks.items()}
    out: dict[Place, Factors] = {}
    for name, node in original.holders.items():
        for axis, term in enumerate(original.typing.of(node.name)):
            atoms = resolve(term)
            out[name, str(axis)] = _factors(atoms, counts)
            if len(atoms) == 1 and isinstance(atoms[0], Concat):
                for number, block in enumerate(atoms[0].blocks):
                    out[name, f"{axis}/{number}"] = _factors(resolve(block), counts)
    return {place: factors for place, factors in out.items() if factors}


def _factors(atoms: Term, counts: Mapping[Var, int]) -> Factors:
    pairs = [(atom_size(atom), kept_size((atom,), counts)) for atom in atoms]
    return tuple((int(a), int(b)) for a, b in pairs) if all(isinstance(size, int) for pair in pairs for size in pair) else ()


# -- configurations ---------------------------------------------------------------------------------


def fields(config: Any) -> dict[str, Any]:
    """Every plain field of a configuration and of those inside it, by dotted name."""
    out: dict[str, Any] = {}

    def collect(data: Mapping[str, Any], prefix: str) -> None:
        for name, value in data.items():
            if isinstance(value, Mapping) and "model_type" in value:
                collect(value, f"{prefix}{name}.")
            else:
                out[prefix + name] = value

    collect(config.to_dict(), "")
    return out


def with_fields(config: Any, updates: Mapping[str, Any]) -> Any:
    """The configuration that says something else in some fields, checked as when it is read from a file.

    Raises:
        Exception: The class refuses it; what that raises is the library's choice.
    """
    data = copy.deepcopy(config.to_dict())
    for name, value in updates.items():
        *path, leaf = name.split(".")
        inner = data
        for part in path:
            inner = inner[part]
        inner[leaf] = value
    return type(config).from_dict(data)


@cache
def table() -> dict[str, dict[str, str]]:
    """Model type to field to place, from ``hf_fields.toml``."""
    raw = tomllib.loads(files("irprune.backend").joinpath("hf_fields.toml").read_text(encoding="utf-8"))
    return {kind: raw[entry["like"]] if "like" in entry else entry for kind, entry in raw.items()}


_PLACE = re.compile(r"(?P<tensor>[\w.]+):(?P<axis>\d+(/\d+)?)( (?P<part>major|minor|rest))?")


class Unfit(Exception):
    """The shapes are not those of one configuration; the text says why."""


def listed(config: Any, sizes: Sizes) -> Updates | None:
    """What the table says the fields must be; ``None`` where it has no entry for any part of the configuration.

    Raises:
        Unfit: A field would have to differ from layer to layer.
    """
    updates: Updates = {}
    entries = 0
    for prefix, part in _parts(config):
        entry = table().get(part.model_type)
        if entry is None:
            continue
        entries += 1
        for name, text in entry.items():
            value = getattr(part, name, None)
            found = _read(entry, name, text, value, part, sizes)
            if found is not None and found != value:
                updates[prefix + name] = found
    return updates if entries else None


def _parts(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    yield prefix, config
    for name in getattr(config, "sub_configs", {}) or {}:
        inner = getattr(config, name, None)
        if inner is not None and hasattr(inner, "model_type"):
            yield from _parts(inner, f"{prefix}{name}.")


def _read(entry: Mapping[str, str], name: str, text: str, value: Any, config: Any, sizes: Sizes) -> int | None:
    match = _PLACE.fullmatch(text)
    assert match is not None, text
    found: dict[int, str] = {}
    for (tensor, axis), factors in sizes.factors.items():
        if axis != match["axis"] or not f".{tensor}".endswith(f".{match['tensor']}"):
            continue
        if match["part"] == "rest":
            partner = next(other for other, place in entry.items() if place == f"{match['tensor']}:{axis} major")
            major = _part(factors, "major", getattr(config, partner))
            whole = math.prod(old for old, _ in factors), math.prod(new for _, new in factors)
            new = whole[1] // major if major and whole[0] != whole[1] and whole[1] % major == 0 else None
        else:
            new = _part(factors, match["part"], value)
        if new is not None:
            found.setdefault(new, tensor)
    if len(found) > 1:
        (a, at), (b, bt), *_ = found.items()
        raise Unfit(f"{name} would be {a} for {at} and {b} for {bt}")
    return next(iter(found), None)


def _part(factors: Factors, part: str | None, value: Any) -> int | None:
    """The new size of the part of an axis whose old size was ``value``."""
    whole_old, whole_new = math.prod(old for old, _ in factors), math.prod(new for _, new in factors)
    if part is None:
        return whole_new if value in (None, whole_old) else None
    if not isinstance(value, int):
        return None
    cuts = range(len(factors) + 1)
    runs = [factors[:cut] for cut in cuts] if part == "major" else [factors[cut:] for cut in reversed(cuts)]
    for run in runs:
        if math.prod(old for old, _ in run) == value:
            return math.prod(new for _, new in run)
    return value if whole_old == whole_new else None


def uneven(sizes: Sizes) -> str | None:
    """A tensor of repeated layers that is not of one size in all of them, in words."""
    first: dict[tuple[str, Shape], str] = {}
    for name in sizes.new:
        blank = re.sub(r"\.\d+\.", ".*.", name)
        other = first.setdefault((blank, sizes.old[name]), name)
        if sizes.new[other] != sizes.new[name]:
            return f"{other} has shape {list(sizes.new[other])} and {name} {list(sizes.new[name])}"
    return None


Build = Callable[[Any], Any]


def mismatches(model: Any, sizes: Sizes) -> list[str]:
    """Tensors of which a model built from a configuration has another shape than the pruned one, in words."""
    have = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    out = []
    for name, shape in sizes.new.items():
        if have.get(name) != shape:
            found = f"would have shape {list(have[name])}" if name in have else "would not be there"
            out.append(f"{name} has shape {list(shape)} and {found}")
    return out


def configure(config: Any, sizes: Sizes, build: Build, agrees: Callable[[Any], str | None], *, use_table: bool = True) -> tuple[Any, str]:
    """A configuration from which the genuine class is what the pruned model is.

    Args:
        config: The configuration before; it stays as it is.
        sizes: What changed.
        build: A model without data of a configuration.
        agrees: Whether a configuration of the right shapes also gives the right numbers: ``None``, or
            why not.
        use_table: Look into the table before fields are tried.

    Returns:
        The configuration, and how it was found: ``unchanged``, ``table`` or ``tried``.

    Raises:
        Unfit: There is none, as far as the search goes; the text says what does not fit.
    """
    different = uneven(sizes)
    if different is not None:
        raise Unfit(different)
    search = _Search(config, sizes, build, agrees)
    if not sizes.changed:
        search.accept({})
        return search.config({}), "unchanged"
    reason = None
    updates = listed(config, sizes) if use_table else None
    if updates is not None:
        try:
            search.accept(updates)
            return search.config(updates), "table"
        except Unfit as error:
            reason = error
    try:
        return search.config(search.tried()), "tried"
    except Unfit as error:
        raise reason or error from None


class _Search:
    """Sets fields whose value is an old size to the new one, the fewest that do."""

    def __init__(self, config: Any, sizes: Sizes, build: Build, agrees: Callable[[Any], str | None]) -> None:
        self._config = config
        self._sizes = sizes
        self._build = build
        self._agrees = agrees

    def config(self, updates: Updates) -> Any:
        return with_fields(self._config, updates)

    def wrong(self, updates: Updates) -> list[str]:
        """What the model of a configuration has wrong."""
        try:
            return mismatches(self._build(self.config(updates)), self._sizes)
        except Exception as error:
            told = ", ".join(f"{name}={value}" for name, value in updates.items())
            cause = str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
            raise Unfit(f"the configuration refuses {told}: {cause}") from error

    def accept(self, updates: Updates) -> None:
        """Pass, or say what is wrong."""
        wrong = self.wrong(updates)
        if wrong:
            raise Unfit(wrong[0] + (f", and {len(wrong) - 1} more do not fit" if len(wrong) > 1 else ""))
        differs = self._agrees(self.config(updates))
        if differs is not None:
            raise Unfit(differs)

    def moves(self) -> list[tuple[str, int]]:
        """``(field, new value)``: the most frequent new sizes of what a field counts come first."""
        counted: dict[int, Counter[int]] = {}
        for _, _, _, old, new in self._sizes.readings():
            if old != new:
                counted.setdefault(old, Counter())[new] += 1
        whole = Counter(new for _, shapes in ((n, (self._sizes.old[n], self._sizes.new[n])) for n in self._sizes.changed)
                        for old, new in zip(*shapes, strict=True) if old != new)  # fmt: skip
        out = []
        for name, value in fields(self._config).items():
            if isinstance(value, int) and not isinstance(value, bool):
                out += [(name, new) for new, _ in counted.get(value, Counter()).most_common()]
            elif value is None and not name.endswith("_id"):
                out += [(name, new) for new, _ in whole.most_common()]
        return out

    def tried(self) -> Updates:
        updates, moves = self._shaped()
        try:
            self.accept(updates)
        except Unfit as error:
            first = error
        else:
            return updates
        # The shapes are right and the numbers are not: a field that shows in no shape, as a number of heads.
        rest = [move for move in moves if move[0] not in updates]
        for move in track(rest, "fields of the configuration"):
            try:
                self.accept({**updates, **dict([move])})
            except Unfit:
                continue
            return {**updates, **dict([move])}
        raise first

    def _shaped(self) -> tuple[Updates, list[tuple[str, int]]]:
        """Fields that make all shapes right."""
        updates: Updates = {}
        left, moves = self._count(updates), self.moves()
        while left:
            best: tuple[int, Updates] | None = None
            for one in track(moves, "fields of the configuration"):
                count = self._count({**updates, **dict([one])})
                if count is not None and count < left and (best is None or count < best[0]):
                    best = count, dict([one])
            if best is None:
                pairs = itertools.islice(itertools.combinations(moves, 2), _MOST_PAIRS)
                for a, b in track(list(pairs), "fields of the configuration"):
                    count = self._count({**updates, **dict([a, b])}) if a[0] != b[0] else None
                    if count is not None and count < left and (best is None or count < best[0]):
                        best = count, dict([a, b])
            if best is None:
                wrong = self.wrong(updates)
                raise Unfit(wrong[0] + (f", and {len(wrong) - 1} more do not fit" if len(wrong) > 1 else ""))
            left = best[0]
            updates |= best[1]
        return updates, moves

    def _count(self, updates: Updates) -> int | None:
        try:
            return len(self.wrong(updates))
        except Unfit:
            return None
