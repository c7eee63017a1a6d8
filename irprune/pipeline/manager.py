"""The pass manager: checks a pipeline as a whole, then runs it step by step.

It orders nothing by magic. It fills in an analysis that is missing, gives a pass only the facts it
declared, and drops what analyses found when a pass returned another program.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from irprune.errors import PipelineError
from irprune.ir.facts import Fact, Workspace
from irprune.ir.program import Program
from irprune.pipeline import registry
from irprune.pipeline.passes import Facts, Pass, Result
from irprune.pipeline.progress import doing

if TYPE_CHECKING:
    from irprune.pipeline.journal import Journal


@dataclass
class Step:
    """One pass at work, as instruments see it.

    Attributes:
        of: The pass.
        number: Its place in the completed pipeline, from 1.
        total: Number of passes in it.
        program: Its input.
        facts: What is known before it.
        result: What it returned; ``None`` until it has.
        seconds: How long it took.
        recalled: It did not run: its result is that of an earlier process of the run.
    """

    of: Pass
    number: int
    total: int
    program: Program
    facts: Facts
    result: Result | None = None
    seconds: float = 0.0
    recalled: bool = False


class Instrument:
    """Something that watches passes without taking part. Its output never changes a result."""

    def watch(self, step: Step) -> AbstractContextManager[None]:
        """Entered before a pass runs and left when it has returned or raised."""
        return nullcontext()


def run(
    passes: Sequence[Pass],
    program: Program,
    facts: Facts | Iterable[Fact] = (),
    instruments: Sequence[Instrument] = (),
    journal: Journal | None = None,
) -> tuple[Program, Facts]:
    """Run a pipeline.

    Args:
        passes: The pipeline; missing analyses are filled in.
        program: The input, which stays as it is.
        facts: What is known beforehand (the task, the workspace).
        instruments: Watchers, the first one outermost.
        journal: Where the result of each pass is written down, and read from if an earlier process got it.

    Returns:
        The program that the last pass returned, and all facts that hold for it.

    Raises:
        PipelineError: A pass needs what nothing gives. Nothing has run then.
    """
    facts = Facts(facts)
    passes = completed(passes, [type(fact) for fact in facts])
    for number, one in enumerate(passes, 1):
        if journal is not None and Workspace in facts:
            facts = facts.updated([dataclasses.replace(facts[Workspace], progress=journal.work(number))])
        step = Step(one, number, len(passes), program, facts)
        recalled = journal.recall(number, one, program, facts) if journal is not None else None
        step.recalled = recalled is not None and recalled.result is not None
        with ExitStack() as stack:
            for instrument in instruments:
                stack.enter_context(instrument.watch(step))
            if recalled is not None and recalled.result is not None:
                result, step.seconds = recalled.result, recalled.seconds
            else:
                start = time.perf_counter()
                result = one.run(program, facts.restricted(one))
                step.seconds = time.perf_counter() - start
                _check_promise(one, program, result)
            step.result = result
        if journal is not None and not step.recalled:
            with doing("keep the result"):
                journal.keep(number, one, program, result, step.seconds)
        if result.program is not program:
            facts = facts.after_change()
        program = result.program.applied(str(one), step.seconds)
        facts = facts.updated(result.facts)
    return program, facts


def _check_promise(one: Pass, program: Program, result: Result) -> None:
    given = {type(fact) for fact in result.facts}
    assert given >= set(one.given()), f"pass {one.name} did not give {_names(set(one.given()) - given)}"
    undeclared = {kind for kind in given if not kind.lasting} - {*one.gives, *one.may_give}
    assert not undeclared, f"pass {one.name} gives {_names(undeclared)} without declaring it in 'gives' or 'may_give'"
    assert one.changes or result.program is program, f"pass {one.name} returns another program without declaring 'changes'"


def completed(passes: Sequence[Pass], known: Iterable[type[Fact]] = ()) -> list[Pass]:
    """The pipeline with what is missing filled in, every need met.

    An analysis that stood earlier in the pipeline is repeated with the same options where a change of
    the program made it stale; one that never stood there is taken with its defaults.

    Args:
        passes: The pipeline as the user wrote it.
        known: Kinds of facts that are there before it starts.

    Raises:
        PipelineError: A pass needs a fact that no pass before it gives and that cannot be filled in.
    """
    have = set(known)
    out: list[Pass] = []
    for one in passes:
        for step in (*_missing(one, have, out), one):
            out.append(step)
            if step.changes:
                have = {kind for kind in have if kind.lasting}
            have.update(step.given())
    return out


def _missing(one: Pass, have: set[type[Fact]], before: Sequence[Pass], callers: tuple[Pass, ...] = ()) -> Iterator[Pass]:
    """The passes to run first so that ``one`` has all it needs, in order."""
    have = set(have)
    for kind in one.needs:
        if kind in have:
            continue
        filler = _filler(one, kind, before)
        if any(type(filler) is type(caller) for caller in (*callers, one)):
            raise PipelineError(f"pass '{one.name}' needs {kind.__name__}, which pass '{filler.name}' gives, which in turn needs this pass")
        steps = [*_missing(filler, have, before, (*callers, one)), filler]
        for step in steps:
            have.update(step.given())
        yield from steps


def _filler(one: Pass, kind: type[Fact], before: Sequence[Pass]) -> Pass:
    """The pass that gives an analysis: the last one in the pipeline so far, else the only one that exists.

    A lasting fact is no analysis: what gives it writes a file or measures, which is for the user to ask.
    """
    earlier = next((step for step in reversed(before) if kind in step.given() and not step.changes), None)
    if earlier is not None:
        return earlier
    givers = [cls for cls in registry.loadable().values() if kind in (*cls.gives, *(cls.may_give if kind.lasting else ()))]
    fillers = [cls for cls in givers if not cls.changes and not any(info.is_required() for info in cls.model_fields.values())]
    if len(fillers) == 1 and not kind.lasting:
        return fillers[0]()
    names = " or ".join(f"'{cls.name}'" for cls in givers)
    raise PipelineError(
        f"pass '{one.name}' needs {kind.__name__}, which no pass before it gives",
        hint=f"put {names} before it" if givers else f"no registered pass gives {kind.__name__}; install or register one that does",
    )


def _names(kinds: Iterable[type[Fact]]) -> str:
    return ", ".join(sorted(kind.__name__ for kind in kinds))
