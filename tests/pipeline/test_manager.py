"""The pass manager and its instruments."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from torch import fx
from toy_passes import Colours, Cut, Must, Paint, Weigh, Weights

from irprune.errors import PipelineError
from irprune.ir.facts import Fact, Original, Task
from irprune.ir.program import Interface, Program
from irprune.pipeline import registry
from irprune.pipeline.instruments import Progress, Timing, Untouched, fingerprint, timing_table
from irprune.pipeline.manager import Instrument, Step, completed, run
from irprune.pipeline.parser import unparse
from irprune.pipeline.passes import Facts, Pass, Result
from irprune.pipeline.progress import doing, track


@pytest.fixture
def program() -> Program:
    """``relu(linear(x))`` as four nodes and the output."""
    linear = torch.nn.Linear(3, 2, bias=False)
    root = torch.nn.Module()
    root.weight = linear.weight
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("weight")
    y = graph.call_function(torch.ops.aten.linear.default, (x, weight))
    graph.output(graph.call_function(torch.ops.aten.relu.default, (y,)))
    return Program(fx.GraphModule(root, graph), Interface(((torch.ones(2, 3),), {}), ({0: "batch"},), ("x",)))


def test_facts_flow_and_the_provenance_grows(program: Program) -> None:
    after, facts = run([Paint(skip=("output",)), Weigh()], program, [Task("toy")])
    assert facts[Weights] == Weights(8)
    assert [entry.text for entry in after.provenance] == ["paint{skip=[output]}", "weigh"]
    assert after.module is program.module
    assert program.provenance == ()


def test_a_change_drops_what_analyses_found_and_keeps_the_rest(program: Program) -> None:
    after, facts = run([Paint(), Weigh(), Cut()], program, [Task("toy"), Original(program)])
    assert {type(fact) for fact in facts} == {Task, Original}
    assert after.module is not program.module


COMPLETED = {
    "weigh": "paint,weigh",
    "cut": "paint,weigh,cut",
    "paint{skip=[output]},cut": "paint{skip=[output]},weigh,cut",
    "paint{skip=[output]},cut,weigh": "paint{skip=[output]},weigh,cut,paint{skip=[output]},weigh",
    "cut,cut{ratio=0.1}": "paint,weigh,cut,paint,weigh,cut{ratio=0.1}",
}


@pytest.mark.parametrize("text", COMPLETED)
def test_missing_analyses_are_filled_in(text: str) -> None:
    from irprune.pipeline.parser import parse

    assert unparse(completed(parse(text))) == COMPLETED[text]


def test_known_facts_need_no_pass() -> None:
    assert unparse(completed([Weigh()], [Colours])) == "weigh"
    assert unparse(completed([Cut(), Weigh()], [Weights])) == "cut,paint,weigh"


def register(monkeypatch: pytest.MonkeyPatch, *passes: type[Pass]) -> None:
    monkeypatch.setattr(registry, "loadable", lambda: {cls.name: cls for cls in passes})


class Sketch(Pass):
    name: ClassVar = "sketch"
    gives: ClassVar = (Colours,)


class Demanding(Pass):
    name: ClassVar = "demanding"
    gives: ClassVar = (Colours,)
    level: int


class Circular(Pass):
    name: ClassVar = "circular"
    needs: ClassVar = (Weights,)
    gives: ClassVar = (Colours,)


def test_two_that_could_fill_in_are_one_too_many(monkeypatch: pytest.MonkeyPatch, program: Program) -> None:
    register(monkeypatch, Paint, Sketch, Weigh)
    with pytest.raises(PipelineError) as caught:
        run([Weigh()], program)
    assert str(caught.value) == (
        "[pipeline]: pass 'weigh' needs Colours, which no pass before it gives\n  to go on: put 'paint' or 'sketch' before it"
    )


def test_a_pass_with_a_required_option_is_not_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Demanding)
    with pytest.raises(PipelineError, match="put 'demanding' before it"):
        completed([Weigh()])


class Report(Fact):
    lasting: ClassVar[bool] = True


class Reporting(Pass):
    name: ClassVar = "reporting"
    gives: ClassVar = (Report,)

    def run(self, program: Program, facts: Facts) -> Result:
        return Result(program, (Report(),))


class Reader(Pass):
    name: ClassVar = "reader"
    needs: ClassVar = (Report,)

    def run(self, program: Program, facts: Facts) -> Result:
        return Result(program)


def test_what_is_no_analysis_is_not_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Reporting, Reader)
    with pytest.raises(PipelineError, match="put 'reporting' before it"):
        completed([Reader()])
    assert unparse(completed([Reporting(), Reader()])) == "reporting,reader"


def test_nothing_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Weigh, Cut)
    with pytest.raises(PipelineError, match="no registered pass gives Colours; install or register one that does"):
        completed([Cut()])


def test_a_circle_of_needs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Circular, Weigh)
    with pytest.raises(PipelineError, match="pass 'circular' needs Weights, which pass 'weigh' gives, which in turn needs this pass"):
        completed([Weigh()])


def test_nothing_runs_where_the_pipeline_does_not_fit(monkeypatch: pytest.MonkeyPatch, program: Program) -> None:
    register(monkeypatch)
    seen = Timing()
    with pytest.raises(PipelineError):
        run([Must(level=1), Weigh()], program, instruments=[seen])
    assert seen.steps == []


class Sneaky(Pass):
    name: ClassVar = "sneaky"
    gives: ClassVar = (Weights,)

    def run(self, program: Program, facts: Facts) -> Result:
        return Result(program, (Weights(facts[Colours].count),))


class Liar(Pass):
    name: ClassVar = "liar"
    gives: ClassVar = (Weights,)

    def run(self, program: Program, facts: Facts) -> Result:
        return Result(program)


class Talker(Pass):
    name: ClassVar = "talker"

    def run(self, program: Program, facts: Facts) -> Result:
        return Result(program, (Weights(1),))


class Quiet(Pass):
    name: ClassVar = "quiet"

    def run(self, program: Program, facts: Facts) -> Result:
        return Result(program.clone())


class Vandal(Pass):
    name: ClassVar = "vandal"
    what: str

    def run(self, program: Program, facts: Facts) -> Result:
        relu = next(node for node in program.nodes if "relu" in node.name)
        if self.what == "graph":
            relu.target = torch.ops.aten.sigmoid.default
        elif self.what == "weight":
            with torch.no_grad():
                program.tensors["weight"].mul_(2)
        else:
            program.module.weight = torch.nn.Parameter(torch.zeros(2, 3))
        return Result(program)


BREACHES: dict[str, tuple[Pass, str]] = {
    "reads": (Sneaky(), "pass sneaky reads Colours without declaring it in 'needs' or 'uses'"),
    "gives less": (Liar(), "pass liar did not give Weights"),
    "gives more": (Talker(), "pass talker gives Weights without declaring it in 'gives'"),
    "changes": (Quiet(), "pass quiet returns another program without declaring 'changes'"),
    "edits the graph": (Vandal(what="graph"), "pass vandal modified its input"),
    "edits a weight": (Vandal(what="weight"), "pass vandal modified its input"),
    "replaces a weight": (Vandal(what="tensor"), "pass vandal modified its input"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_pass_that_breaks_the_contract_is_our_bug(program: Program, breach: str) -> None:
    one, message = BREACHES[breach]
    with pytest.raises(AssertionError, match=message):
        run([one], program, [Colours(3)] if breach == "reads" else [], [Untouched()])


def test_running_a_program_leaves_its_fingerprint(program: Program) -> None:
    before = fingerprint(program)
    program(torch.ones(4, 3)).sum().backward()
    assert fingerprint(program) == before


class Watch(Instrument):
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    @contextmanager
    def watch(self, step: Step) -> Iterator[None]:
        self.log.append(f"{self.name} {step.number}/{step.total} {step.of.name}")
        yield
        assert step.result is not None
        self.log.append(f"{self.name} done")


def test_instruments_nest_the_first_outermost(program: Program) -> None:
    log: list[str] = []
    run([Paint(), Weigh()], program, instruments=[Watch("a", log), Watch("b", log)])
    assert log == [
        *("a 1/2 paint", "b 1/2 paint", "b done", "a done"),
        *("a 2/2 weigh", "b 2/2 weigh", "b done", "a done"),
    ]


def test_timing_lists_every_pass(program: Program) -> None:
    timing = Timing()
    after, _ = run([Weigh()], program, instruments=[timing])
    assert [(str(step.of), step.seconds) for step in timing.steps] == [(one.text, one.seconds) for one in after.provenance]
    assert all(step.seconds > 0 for step in timing.steps)
    assert timing_table(timing.steps).row_count == 3


class Loop(Pass):
    name: ClassVar = "loop"

    def run(self, program: Program, facts: Facts) -> Result:
        assert sum(track([1, 2, 3], "adding")) == 6
        return Result(program)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only(program: Program, terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    progress = Progress(console)
    with progress.live(), doing("waiting"):
        run([Loop()], program, instruments=[progress])
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(text in shown for text in ("waiting", "1/1 loop", "adding")) if terminal else shown == ""


def test_lasting_facts_of_a_pass_survive_a_change(program: Program) -> None:
    _, facts = run([Reporting(), Cut()], program)
    assert Report in facts
    assert Weights not in facts
