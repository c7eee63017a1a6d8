"""Which groups may lose indices, and why the others may not."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from irprune.analysis.plan import layer_of, layers_of, modules_of
from irprune.backend.multiples import Multiples
from irprune.errors import NothingPrunableError, OptionError
from irprune.ir.dims import Atom, Concat, Indexed, Term, Var, atom_size, resolve, variables
from irprune.ir.facts import Group, Groups
from irprune.ir.program import Program

LAYERS = re.compile(r"(-?\d+)?:(-?\d+)?")


@dataclass(frozen=True)
class Filter:
    """The options that say which groups are pruned; see :class:`irprune_passes.prune.Prune`."""

    kinds: Sequence[str]
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    layers: str | None = None
    protect: Sequence[str] = ()
    min_keep: int = 1


@dataclass(frozen=True)
class Selection:
    """The groups that may lose indices, and the others by what keeps them whole.

    Attributes:
        chosen: In order of execution.
        left: A clause such as ``of kind residual`` or ``frozen (interface)`` to the groups it holds for.
    """

    chosen: tuple[Group, ...]
    left: Mapping[str, tuple[Group, ...]]

    def __str__(self) -> str:
        return ", ".join(f"{len(groups)} {reason}" for reason, groups in self.left.items())


def select(program: Program, groups: Groups, by: Filter) -> Selection:
    """Sort the groups into those that may be pruned and those that may not.

    Raises:
        OptionError: A pattern or a name fits nothing in the program.
        NothingPrunableError: No group is left; the error counts them by reason.
    """
    tensors = [*program.tensors, *program.aliases]
    reasons = _reasons(program, by, tensors)
    chosen: list[Group] = []
    left: dict[str, list[Group]] = {}
    for group in groups:
        reason = next(filter(None, (check(group) for check in reasons)), None)
        if reason is None:
            chosen.append(group)
        else:
            left.setdefault(reason, []).append(group)
    selection = Selection(tuple(chosen), {reason: tuple(held) for reason, held in left.items()})
    if not chosen:
        found = f"of {len(groups)} groups, {selection}" if len(groups) else "the program has no groups"
        raise NothingPrunableError(f"no group may be pruned: {found}", where="pass prune", hint=_way_on(selection))
    return selection


def _reasons(program: Program, by: Filter, tensors: Sequence[str]) -> list[Callable[[Group], str | None]]:
    """Checks in the order in which they are reported; each gives a clause if it keeps a group whole."""
    paths = modules_of(tensors)
    for pattern in (*by.include, *by.exclude):
        if not fnmatch.filter(paths, pattern):
            raise OptionError(f"pattern '{pattern}' fits no tensor and no module of the program{_near(pattern, paths)}", where="pass prune")
    for name in by.protect:
        if name not in paths:
            raise OptionError(f"'{name}' is no tensor and no module of the program{_near(name, paths)}", where="pass prune")
    protected = {program.aliases.get(name, name) for name in tensors if not modules_of([name]).isdisjoint(by.protect)}
    layers = _layers(by.layers, tensors)

    def matches(group: Group, patterns: Iterable[str]) -> bool:
        near = modules_of(member.tensor for member in group.members)
        return any(fnmatch.filter(near, pattern) for pattern in patterns)

    return [
        lambda group: None if group.frozen is None else f"frozen ({group.frozen.code})",
        lambda group: None if group.kind in by.kinds or "all" in by.kinds else f"of kind {group.kind}",
        lambda group: None if layers is None or layers_of(group) <= layers else f"outside layers {by.layers}",
        lambda group: None if not by.include or matches(group, by.include) else "not in `include`",
        lambda group: "in `exclude`" if matches(group, by.exclude) else None,
        lambda group: None if protected.isdisjoint(member.tensor for member in group.members) else "in `protect`",
        lambda group: None if group.size > max(by.min_keep, group.least) else f"with no more than `min_keep` ({by.min_keep}) indices",
    ]


def _layers(text: str | None, tensors: Iterable[str]) -> frozenset[int] | None:
    if text is None:
        return None
    match = LAYERS.fullmatch(text)
    assert match is not None
    start, stop = (None if part is None else int(part) for part in match.groups())
    numbers = [number for name in tensors if (number := layer_of(name)) is not None]
    return frozenset(range(max(numbers, default=-1) + 1)[start:stop])


def _near(name: str, paths: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(paths), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _way_on(selection: Selection) -> str:
    """What could be relaxed so that a group may be pruned."""
    kinds = sorted({group.kind for reason, held in selection.left.items() if reason.startswith("of kind") for group in held})
    if kinds:
        return f"add {', '.join(kinds)} to `kinds`"
    if selection.left and all(reason.startswith("frozen") for reason in selection.left):
        return "`irprune explain` says for a group which operation froze it"
    return "relax `layers`, `include`, `exclude`, `protect` or `min_keep`"


# -- rounding ---------------------------------------------------------------------------------------


def units(program: Program, chosen: Sequence[Group], round_to: Multiples) -> dict[str, int]:
    """For each group the number whose multiples, as kept counts, make tensor axes multiples of ``round_to``.

    Which of the two holds for a group, a kernel among its tensors decides.

    Axis sizes of parameters and buffers are meant: 3 heads of 64 need no rounding to 8, since the axis
    is 192 long. Where two chosen variables share an axis, the larger one is rounded first and counts as
    a factor for the other. Blocks of a concatenation (gate and up in one weight) are rounded each for
    itself. Numbers of experts are no sizes of a matrix product and stay unrounded.
    """
    steady: dict[Var, int] = {group.var: 1 for group in chosen}
    found = {}
    for group in sorted(chosen, key=lambda group: -group.size):
        terms = [program.typing.of(program.holders[member.tensor].name)[member.axis] for member in group.members]
        factors = [factor for term in terms for factor in _factors(term, group.var, steady)]
        convolves = any(program.tensors[member.tensor].ndim > 2 and member.axis < 2 for member in group.members)
        multiple = round_to.convolution if convolves and group.kind != "experts" else round_to.product
        unit = 1 if group.kind == "experts" else math.lcm(*(multiple // math.gcd(multiple, factor) for factor in factors))
        found[group.name] = unit
        steady[group.var] = math.gcd(unit, group.size)
    return found


def _factors(term: Term, var: Var, steady: Mapping[Var, int]) -> list[int]:
    """What one index of ``var`` is multiplied by along an axis, one number per occurrence."""
    atoms = resolve(term)
    out = []
    for i, atom in enumerate(atoms):
        major = math.prod(_steady(other, steady) for other in atoms[:i] if isinstance(other, Var))
        rest = major * math.prod(_steady(other, steady) for other in atoms[i + 1 :])
        views = [block[0] for block in atom.blocks if len(block) == 1] if isinstance(atom, Concat) else [atom]
        shown = sum(len(view.positions) for view in views if isinstance(view, Indexed) and view.var is var)
        if shown:
            out.append(rest * max(shown // int(var.size), 1))
        if isinstance(atom, Concat):
            blocks = (block for block in atom.blocks if not (len(block) == 1 and isinstance(block[0], Indexed)))
            out += [rest * inner for block in blocks for inner in _factors(block, var, steady)]
        elif atom is var:
            out.append(rest)
    return out


def _steady(atom: Atom, steady: Mapping[Var, int]) -> int:
    """A number that divides the atom's size whatever is removed."""
    if isinstance(atom, Var):
        return steady.get(atom, int(atom.size))
    if isinstance(atom, Indexed):
        shown, size = len(atom.positions), int(atom.var.size)
        return shown // size * steady.get(atom.var, size) if shown % size == 0 else 1
    if steady.keys().isdisjoint(variables((atom,))):
        return int(atom_size(atom))
    return math.gcd(*(math.prod(_steady(inner, steady) for inner in resolve(block)) for block in atom.blocks))
