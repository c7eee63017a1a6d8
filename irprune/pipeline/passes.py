"""The pass contract: what a pass needs, what it gives, what can be set. Nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict

from irprune.ir.facts import Fact
from irprune.ir.program import Program

F = TypeVar("F", bound=Fact)


class Facts:
    """The facts that a pass may read: exactly those it declared."""

    def __init__(self, facts: Iterable[Fact] = (), *, reader: str = "", declared: tuple[type[Fact], ...] | None = None) -> None:
        self._facts: dict[type[Fact], Fact] = {type(fact): fact for fact in facts}
        self._reader = reader
        self._declared = declared

    def __getitem__(self, kind: type[F]) -> F:
        if self._declared is not None and kind not in self._declared:
            raise AssertionError(f"pass {self._reader} reads {kind.__name__} without declaring it in 'needs' or 'uses'")
        fact = self._facts[kind]
        assert isinstance(fact, kind)
        return fact

    def get(self, kind: type[F]) -> F | None:
        """The fact, or ``None`` where it is not there (for kinds declared in ``uses``)."""
        if self._declared is not None and kind not in self._declared:
            raise AssertionError(f"pass {self._reader} reads {kind.__name__} without declaring it in 'needs' or 'uses'")
        fact = self._facts.get(kind)
        assert fact is None or isinstance(fact, kind)
        return fact

    def __contains__(self, kind: type[Fact]) -> bool:
        return kind in self._facts

    def __iter__(self) -> Iterator[Fact]:
        return iter(self._facts.values())

    def restricted(self, reader: Pass) -> Facts:
        """The same facts, readable only as the pass declared."""
        return Facts(self._facts.values(), reader=reader.name, declared=(*reader.needs, *reader.uses))

    def updated(self, facts: Iterable[Fact]) -> Facts:
        return Facts([*self._facts.values(), *facts])

    def after_change(self) -> Facts:
        """The facts that still hold when the program has changed."""
        return Facts(fact for fact in self._facts.values() if fact.lasting)


@dataclass(frozen=True)
class Result:
    """What a pass returns: a program (the same one if it only looked) and new facts."""

    program: Program
    facts: tuple[Fact, ...] = field(default=())


class Pass(BaseModel):
    """One step of the compiler. Its fields are its options, with bounds and help texts.

    A pass never edits its argument, prints, times, saves outside the :class:`Workspace`, or reads
    the environment or a global seed. Long loops go through :func:`irprune.pipeline.progress.track`.

    Attributes:
        name: What a pipeline calls it.
        needs: Facts that it reads; they must be there.
        uses: Facts that it reads where they are there.
        gives: Facts that every run of it returns.
        may_give: Analyses that it returns where its options ask for them.
        changes: Whether its result may be another program: what analyses found is then dropped.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: ClassVar[str]
    needs: ClassVar[tuple[type[Fact], ...]] = ()
    uses: ClassVar[tuple[type[Fact], ...]] = ()
    gives: ClassVar[tuple[type[Fact], ...]] = ()
    may_give: ClassVar[tuple[type[Fact], ...]] = ()
    changes: ClassVar[bool] = False

    def run(self, program: Program, facts: Facts) -> Result:
        raise NotImplementedError

    def given(self) -> tuple[type[Fact], ...]:
        """What this run of it returns: ``gives``, and what its options ask for of ``may_give``."""
        return self.gives

    def revived(self, program: Program, facts: Facts, given: tuple[Fact, ...]) -> tuple[Fact, ...]:
        """Facts that an earlier process of the same run got from this pass, whole again.

        A run keeps what passes return as plain data. A field of a fact that is none is marked with
        ``field(metadata={"live": True})`` and left out; here the pass puts it in again.

        Args:
            program: The program that the pass returned.
            facts: What was known before it.
            given: The facts as they were read back.
        """
        return given

    def __str__(self) -> str:
        """The text form: ``name{key=value …}`` with the options that differ from the defaults."""
        from irprune.pipeline.parser import unparse

        return unparse(self)


def options(of: type[Pass]) -> dict[str, Any]:
    """The option fields of a pass with their pydantic ``FieldInfo``."""
    return dict(of.model_fields)
