"""Dimension terms: axes as types, coupling as unification.

An axis of a tensor is a *term*: a row-major product of *atoms*, major first. An atom is a
variable, a concatenation of terms, or a variable seen through a static index map::

    term := (atom, ...)                  the empty term is an axis of size 1
    atom := Var(size) | Concat(term, ...) | Indexed(Var, positions)

``heads * head_dim`` flattened is ``(heads, head_dim)``; a fused ``q|k|v`` is
``(Concat((q,), (k,), (v,)),)``. :meth:`Dims.unify` makes two axes the same, as type inference does.
Where two terms do not line up, everything in them is frozen: never pruned. So an axis that is not
understood costs an opportunity and never correctness.

Operations that permute single positions (flip, a constant index) cut a variable into blocks of one
position, which unification ties where data say so: what is left are the *orbits* of positions. When
all operations have been seen, :meth:`Dims.join` makes one variable of blocks that always stand
together; an axis is then that variable through the map from its positions to orbits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import sympy

Size: TypeAlias = "int | sympy.Expr"
Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Freeze:
    """Why a variable is never pruned.

    Attributes:
        code: ``interface``, ``no-rule``, ``data-dependent``, ``misaligned``, ``position``, ``user`` …
        message: One clause for a person.
        node: The operation that decided it, if one did.
    """

    code: str
    message: str
    node: str | None = None


class Var:
    """An unknown set of ``size`` interchangeable positions.

    A variable is free, frozen, or bound to a term that replaces it everywhere.
    """

    __slots__ = ("bound", "frozen", "size", "uid")

    def __init__(self, uid: int, size: Size) -> None:
        self.uid = uid
        self.size = size
        self.bound: Term | None = None
        self.frozen: Freeze | None = None

    def __repr__(self) -> str:
        return f"d{self.uid}:{self.size}"


@dataclass(frozen=True)
class Concat:
    """One block after another along an axis."""

    blocks: tuple[Term, ...]

    def __repr__(self) -> str:
        return "(" + "|".join("*".join(map(repr, block)) or "1" for block in self.blocks) + ")"


@dataclass(frozen=True)
class Indexed:
    """Indices of a variable in a given order, with repetitions: a view through a static index map."""

    var: Var
    positions: tuple[int, ...]

    def __repr__(self) -> str:
        return f"{self.var}[{','.join(map(str, self.positions))}]"


Atom: TypeAlias = "Var | Concat | Indexed"
Term: TypeAlias = "tuple[Atom, ...]"
UNIT: Term = ()


def as_size(value: Any) -> Size:
    """A plain ``int`` or a sympy expression for a ``SymInt``."""
    if isinstance(value, int):
        return value
    node = getattr(value, "node", None)
    expr = node.expr if node is not None else sympy.sympify(value)
    return int(expr) if expr.is_Integer else expr


def quotient(a: Size, b: Size) -> Size | None:
    """``a / b`` if it is a whole number, or a polynomial for symbolic sizes; else ``None``."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    result = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    if sympy.fraction(result)[1] != 1:
        return None
    return int(result) if result.is_Integer else result


def atom_size(atom: Atom) -> Size:
    if isinstance(atom, Var):
        return atom.size
    if isinstance(atom, Indexed):
        return len(atom.positions)
    total: Size = 0
    for block in atom.blocks:
        total = total + term_size(block)
    return total


def term_size(term: Term) -> Size:
    if len(term) == 1:
        return atom_size(term[0])
    total: Size = 1
    for atom in term:
        total = total * atom_size(atom)
    return total


def resolve(term: Term) -> Term:
    """The term with every bound variable replaced, products and concatenations flattened."""
    if not term or (len(term) == 1 and isinstance(term[0], Var) and term[0].bound is None):
        return term
    out: list[Atom] = []
    changed = False
    for atom in term:
        if isinstance(atom, Var):
            if atom.bound is None:
                out.append(atom)
                continue
            atom.bound = resolve(atom.bound)
            out.extend(atom.bound)
            changed = True
        elif isinstance(atom, Indexed):
            out.append(atom)
        else:
            new = concat(atom.blocks)
            if len(new) == 1 and isinstance(new[0], Concat) and new[0].blocks == atom.blocks:
                out.append(atom)
            else:
                out.extend(new)
                changed = True
    if len(out) > 1 and any(atom_size(atom) == 1 for atom in out):
        out = [atom for atom in out if not _drop_unit(atom)]
        changed = True
    return tuple(out) if changed else term


def _drop_unit(atom: Atom) -> bool:
    """A single position inside a product always stays, so it need not be written."""
    if atom_size(atom) != 1:
        return False
    if isinstance(atom, Var) and atom.frozen is None:
        atom.frozen = Freeze("unit", "a single position of a product always stays")
    return True


def concat(blocks: Iterable[Term]) -> Term:
    """The normal form of a concatenation: nested ones flattened, empty blocks dropped, views of one variable joined."""
    flat: list[Term] = []
    viewed = False
    for block in blocks:
        block = resolve(block)
        if len(block) == 1 and isinstance(block[0], Concat):
            flat.extend(block[0].blocks)
        elif term_size(block) != 0:
            flat.append(block)
            viewed = viewed or isinstance(block[0] if block else None, Indexed)
    if viewed:
        flat = _joined(flat)
    if len(flat) == 1:
        return flat[0]
    return (Concat(tuple(flat)),)


def _joined(blocks: list[Term]) -> list[Term]:
    """Neighbouring views of one variable as one view, or as the variable where they show all of it in order."""
    out: list[Term] = []
    for var, run in itertools.groupby(blocks, lambda b: b[0].var if len(b) == 1 and isinstance(b[0], Indexed) else None):
        if var is None:
            out.extend(run)
            continue
        positions = tuple(p for block in run for p in block[0].positions)  # type: ignore[union-attr]
        out.append((var,) if positions == tuple(range(int(var.size))) else (Indexed(var, positions),))
    return out


def variables(term: Term) -> Iterator[Var]:
    """The free variables of a resolved term, in order, with repetitions."""
    for atom in term:
        if isinstance(atom, Var):
            yield atom
        elif isinstance(atom, Indexed):
            yield atom.var
        else:
            for block in atom.blocks:
                yield from variables(block)


class Dims:
    """The variables of one program and the operations on their terms."""

    def __init__(self) -> None:
        self._count = itertools.count()

    def fresh(self, size: Size, frozen: Freeze | None = None) -> Term:
        """A new axis of the given size."""
        if isinstance(size, int) and size == 1:
            return UNIT
        var = self._var(size)
        var.frozen = frozen
        return (var,)

    def _var(self, size: Size) -> Var:
        return Var(next(self._count), size)

    # -- freezing -------------------------------------------------------------------------------

    def freeze(self, term: Term, why: Freeze) -> None:
        """Mark every variable of ``term`` as never pruned. The first reason stays."""
        for var in variables(resolve(term)):
            if var.frozen is None:
                var.frozen = why

    def _bind(self, var: Var, term: Term, why: Freeze) -> None:
        if any(inner is var for inner in variables(term)):
            self.freeze((var,), why)
            return
        var.bound = term
        if var.frozen is not None:
            self.freeze(term, var.frozen)
        elif len(term) == 1 and isinstance(term[0], Var):
            return

    # -- unification ----------------------------------------------------------------------------

    def unify(self, s: Term, t: Term, why: Freeze) -> bool:
        """Make two axes the same.

        Products align from the minor end, concatenations by offset; a variable is split where the
        pieces demand it. What cannot be aligned is frozen on both sides for the reason ``why``.

        Returns:
            Whether the two axes now lose the same positions whatever is pruned. If not, all their
            variables are frozen.
        """
        left, right = list(resolve(s)), list(resolve(t))
        while left or right:
            left, right = list(resolve(tuple(left))), list(resolve(tuple(right)))
            while left and right and left[-1] == right[-1]:
                left.pop()
                right.pop()
            if not left or not right:
                break
            a, b = left[-1], right[-1]
            size_a, size_b = atom_size(a), atom_size(b)
            if (size_a == 1) != (size_b == 1):
                single = left if size_a == 1 else right
                self.freeze((single.pop(),), Freeze("unit", "a single position of a product always stays", why.node))
                continue
            if size_a == size_b:
                left.pop()
                right.pop()
                if not self._unify_atoms(a, b, why):
                    return self._misaligned(s, t, why)
                continue
            if quotient(size_a, size_b) is None and quotient(size_b, size_a) is None:
                return self._unify_ends(left, right, why) or self._misaligned(s, t, why)
            longer, m = (left, size_b) if quotient(size_a, size_b) is not None else (right, size_a)
            parts = self._factor(longer[-1], m, why)
            if parts is None:
                return self._misaligned(s, t, why)
            longer[-1:] = [*parts[0], *parts[1]]
        if any(atom_size(atom) != 1 for atom in left + right):
            return self._misaligned(s, t, why)
        self.freeze((*left, *right), Freeze("unit", "a single position of a product always stays", why.node))
        return True

    def _unify_ends(self, left: list[Atom], right: list[Atom], why: Freeze) -> bool:
        """Tie what two products whose factors overlap have in common at either end; freeze what lies between."""
        found = False
        for end in (-1, 0):
            a, b = left[end], right[end]
            size_a, size_b = atom_size(a), atom_size(b)
            if not isinstance(size_a, int) or not isinstance(size_b, int):
                return False
            common = math.gcd(size_a, size_b)
            if common == 1:
                continue
            parts = [self._factor(atom, size // common if end == 0 else common, why) for atom, size in ((a, size_a), (b, size_b))]
            if parts[0] is None or parts[1] is None or not self.unify(parts[0][end], parts[1][end], why):
                return False
            found = True
            for atoms, part in zip((left, right), parts, strict=True):
                assert part is not None
                atoms[end : end + 1 or None] = part[end + 1]
        self.freeze((*left, *right) if found else (), why)
        return found

    def _misaligned(self, s: Term, t: Term, why: Freeze) -> bool:
        self.freeze(s, why)
        self.freeze(t, why)
        return False

    def _unify_atoms(self, a: Atom, b: Atom, why: Freeze) -> bool:
        if isinstance(a, Var) and isinstance(b, Var):
            old, young = (a, b) if a.uid < b.uid else (b, a)
            self._bind(young, (old,), why)
            return True
        if isinstance(a, Var):
            self._bind(a, (b,), why)
            return True
        if isinstance(b, Var):
            self._bind(b, (a,), why)
            return True
        if isinstance(a, Indexed) or isinstance(b, Indexed):
            return a == b
        left, right = list(a.blocks), list(b.blocks)
        while left and right:
            self._expose(left)
            self._expose(right)
            if not left or not right:
                break
            x, y = left[0], right[0]
            size_x, size_y = term_size(x), term_size(y)
            if size_x == size_y:
                if not self.unify(x, y, why):
                    return False
                left.pop(0)
                right.pop(0)
                continue
            if not (isinstance(size_x, int) and isinstance(size_y, int)):
                return False
            longer, offset = (left, size_y) if size_x > size_y else (right, size_x)
            pieces = self.split(longer[0], offset, why)
            if pieces is None:
                return False
            longer[0:1] = list(pieces)
        return not left and not right

    @staticmethod
    def _expose(blocks: list[Term]) -> None:
        """Resolve the first block; inline it where it is itself a concatenation."""
        head = resolve(blocks[0])
        if len(head) == 1 and isinstance(head[0], Concat):
            blocks[0:1] = head[0].blocks
        else:
            blocks[0] = head

    # -- splitting ------------------------------------------------------------------------------

    def _factor(self, atom: Atom, minor: Size, why: Freeze) -> tuple[Term, Term] | None:
        """Split ``atom`` into ``(major, minor)`` with a minor part of the given size."""
        major = quotient(atom_size(atom), minor)
        if major is None:
            return None
        if isinstance(atom, Var):
            parts = (self.fresh(major), self.fresh(minor))
            self._bind(atom, parts[0] + parts[1], why)
            return parts
        if isinstance(atom, Indexed):
            return None
        return self._factor_blocks(list(atom.blocks), major, minor, why)

    def _factor_blocks(self, blocks: list[Term], major: Size, minor: Size, why: Freeze) -> tuple[Term, Term] | None:
        if all(quotient(term_size(block), minor) is not None for block in blocks):
            majors: list[Term] = []
            shared: Term | None = None
            for block in blocks:
                parts = self.factor(block, minor, why)
                if parts is None:
                    return None
                majors.append(parts[0])
                if shared is None:
                    shared = parts[1]
                elif not self.unify(shared, parts[1], why):
                    return None
            assert shared is not None
            return concat(majors), resolve(shared)
        if not isinstance(major, int) or not isinstance(minor, int):
            return None
        # Several blocks make up one minor part: cut them into equal runs and make the runs the same.
        runs: list[Term] = []
        rest: Term = (Concat(tuple(blocks)),)
        for _ in range(major - 1):
            cut = self.split(rest, minor, why)
            if cut is None:
                return None
            runs.append(cut[0])
            rest = cut[1]
        for run in runs:
            if not self.unify(run, rest, why):
                return None
        return (Concat((UNIT,) * major),), resolve(rest)

    def factor(self, term: Term, minor: Size, why: Freeze) -> tuple[Term, Term] | None:
        """Split a term into ``(major, minor)`` terms with a minor part of the given size."""
        atoms = list(resolve(term))
        taken: list[Atom] = []
        need: Size = minor
        while need != 1:
            if not atoms:
                return None
            size = atom_size(atoms[-1])
            left = quotient(need, size)
            if left is not None:
                taken.insert(0, atoms.pop())
                need = left
                continue
            if quotient(size, need) is None:
                return None
            parts = self._factor(atoms[-1], need, why)
            if parts is None:
                return None
            atoms[-1:] = [*parts[0], *parts[1]]
        return resolve(tuple(atoms)), resolve(tuple(taken))

    def split(self, term: Term, offset: int, why: Freeze) -> tuple[Term, Term] | None:
        """Cut a term in two blocks at ``offset`` (0 < offset < size); ``None`` if that is not possible."""
        term = resolve(term)
        total = term_size(term)
        if not isinstance(total, int) or not 0 < offset < total:
            return None
        head, rest = term[0], term[1:]
        minor = term_size(rest)
        assert isinstance(minor, int)
        if offset % minor == 0:
            cut = self._split_atom(head, offset // minor, why)
            return None if cut is None else (resolve(cut[0] + rest), resolve(cut[1] + rest))
        # The cut falls inside the minor part: lay the major positions out as blocks (so they stay whole).
        count = atom_size(head)
        assert isinstance(count, int)
        self.freeze((head,), Freeze("position", "a slice cuts between its positions", why.node))
        row, column = divmod(offset, minor)
        cut = self.split(rest, column, why)
        if cut is None:
            return None
        rest = resolve(rest)
        return concat([rest] * row + [cut[0]]), concat([cut[1]] + [rest] * (count - row - 1))

    def _split_atom(self, atom: Atom, offset: int, why: Freeze) -> tuple[Term, Term] | None:
        if isinstance(atom, Var):
            assert isinstance(atom.size, int)
            first, second = self.block(offset), self.block(atom.size - offset)
            self._bind(atom, (Concat((first, second)),), why)
            return first, second
        if isinstance(atom, Indexed):
            return None
        done: list[Term] = []
        blocks = list(atom.blocks)
        while offset:
            size = term_size(blocks[0])
            if not isinstance(size, int):
                return None
            if size <= offset:
                done.append(blocks.pop(0))
                offset -= size
                continue
            cut = self.split(blocks[0], offset, why)
            if cut is None:
                return None
            blocks[0:1] = list(cut)
        return concat(done), concat(blocks)

    def block(self, size: int) -> Term:
        """A block of a concatenation: a variable, also where its size is 1."""
        return (self._var(size),)

    def pieces(self, term: Term, sizes: Sequence[int], why: Freeze) -> list[Term] | None:
        """Cut a term in consecutive blocks of the given sizes (all positive)."""
        out: list[Term] = []
        rest = resolve(term)
        if len(rest) == 1 and len(sizes) > 1 and isinstance(rest[0], Var) and sum(sizes) == rest[0].size:
            out = [self.block(size) for size in sizes]
            self._bind(rest[0], (Concat(tuple(out)),), why)
            return out
        for size in sizes[:-1]:
            cut = self.split(rest, size, why)
            if cut is None:
                return None
            out.append(cut[0])
            rest = cut[1]
        out.append(rest)
        return [resolve(piece) for piece in out]

    def unroll(self, term: Term, why: Freeze) -> list[Term] | None:
        """Cut a term into single positions: index-level precision, paid for only where needed."""
        term = resolve(term)
        size = term_size(term)
        if not isinstance(size, int):
            return None
        if size == 1:
            return [term]
        if len(term) == 1 and isinstance(term[0], Concat):
            found = [self.unroll(block, why) for block in term[0].blocks]
            return None if any(cells is None for cells in found) else [cell for cells in found for cell in cells or ()]
        if len(term) == 1:
            return self.pieces(term, [1] * size, why)
        count = atom_size(term[0])
        assert isinstance(count, int)
        self.freeze(term[:1], Freeze("position", "an operation tells positions of its minor factor apart", why.node))
        cells = self.unroll(term[1:], why)
        return None if cells is None else cells * count

    # -- joining --------------------------------------------------------------------------------

    def join(self, places: Iterable[Term], wanted: Iterable[Var]) -> bool:
        """Make one variable of free variables that stand together wherever they stand.

        Two variables are joined if each place holds both equally often and in the same products: a
        removal then costs the same whichever index goes, and what is left of an axis has a size that
        depends on how many indices stay and not on which. To be called once, after inference.

        Args:
            places: Every term that anything is computed from: axes, noted terms, products.
            wanted: The variables that may be joined.

        Returns:
            Whether anything was joined.
        """
        state: dict[Var, int] = dict.fromkeys(wanted, 0)
        codes: dict[object, int] = {}

        def code(key: object) -> int:
            return codes.setdefault(key, len(codes) + 1)

        def walk(term: Term, context: int) -> None:
            for i, atom in enumerate(term):
                if isinstance(atom, Var) and atom not in state:
                    continue
                inner = code((context, term[:i] + term[i + 1 :])) if len(term) > 1 else context
                if isinstance(atom, Var):
                    state[atom] = code((state[atom], inner, 0))
                elif isinstance(atom, Concat):
                    for block in atom.blocks:
                        walk(block, inner)

        for number, term in enumerate(places):
            walk(resolve(term), code((number, "place")))
        classes: dict[int, list[Var]] = {}
        for var, last in state.items():
            if last and var.frozen is None and var.bound is None:
                classes.setdefault(last, []).append(var)
        joined = False
        for members in classes.values():
            if len(members) < 2:
                continue
            whole = self._var(sum(int(var.size) for var in members))  # type: ignore[arg-type]
            start = 0
            for var in members:
                var.bound = (Indexed(whole, tuple(range(start, start + int(var.size)))),)  # type: ignore[arg-type]
                start += int(var.size)  # type: ignore[arg-type]
            joined = True
        return joined


# -- masks and sizes under a plan -----------------------------------------------------------------


def mask_of(term: Term, keep: Mapping[Var, Mask]) -> Mask:
    """The keep mask of an axis: concatenation of blocks, flattened outer AND of factors.

    Args:
        term: A term of integer size.
        keep: One mask per pruned variable; a variable without one is kept whole.
    """
    out: Mask = np.ones(1, dtype=bool)
    for atom in resolve(term):
        if isinstance(atom, Var):
            mask = keep.get(atom)
            mask = np.ones(int(atom.size), dtype=bool) if mask is None else mask
        elif isinstance(atom, Indexed):
            mask = keep.get(atom.var)
            mask = np.ones(len(atom.positions), dtype=bool) if mask is None else mask[list(atom.positions)]
        else:
            mask = np.concatenate([mask_of(block, keep) for block in atom.blocks])
        out = np.logical_and.outer(out, mask).reshape(-1)
    return out


def kept_size(term: Term, counts: Mapping[Var, int]) -> Size:
    """The size of an axis when each variable in ``counts`` keeps that many indices."""
    total: Size = 1
    for atom in resolve(term):
        size: Size = 0
        if isinstance(atom, Var):
            size = counts.get(atom, atom.size)
        elif isinstance(atom, Indexed):
            size = _share(atom, counts)
        else:
            for block in atom.blocks:
                size = size + kept_size(block, counts)
        total = total * size
    return int(total) if isinstance(total, Fraction) and total.denominator == 1 else total


def _share(atom: Indexed, counts: Mapping[Var, int]) -> Any:
    """What is kept of a view if its positions are spread evenly; of parts of an axis, the parts add up to what is kept."""
    kept = counts.get(atom.var)
    return len(atom.positions) if kept is None else Fraction(len(atom.positions) * kept, int(atom.var.size))


def index_maps(term: Term, var: Var) -> list[npt.NDArray[np.int64]]:
    """Where a variable stands in an axis, one array per occurrence in a product.

    Returns:
        Arrays as long as the axis: the variable's index that a position belongs to, or -1. Blocks of
        a concatenation share one array; a factor that occurs twice in a product gives two.
    """
    factors: list[list[npt.NDArray[np.int64]]] = []
    sizes: list[int] = []
    for atom in resolve(term):
        size = atom_size(atom)
        assert isinstance(size, int)
        sizes.append(size)
        if isinstance(atom, Var):
            factors.append([np.arange(size)] if atom is var else [])
            continue
        if isinstance(atom, Indexed):
            factors.append([np.array(atom.positions)] if atom.var is var else [])
            continue
        per_block = [index_maps(block, var) for block in atom.blocks]
        lanes = max((len(maps) for maps in per_block), default=0)
        columns = []
        for lane in range(lanes):
            parts = []
            for block, maps in zip(atom.blocks, per_block, strict=True):
                length = term_size(block)
                assert isinstance(length, int)
                parts.append(maps[lane] if lane < len(maps) else np.full(length, -1))
            columns.append(np.concatenate(parts))
        factors.append(columns)
    out: list[npt.NDArray[np.int64]] = []
    for i, maps in enumerate(factors):
        before, after = int(np.prod(sizes[:i])), int(np.prod(sizes[i + 1 :]))
        out.extend(np.tile(np.repeat(m, after), before) for m in maps)
    return out
