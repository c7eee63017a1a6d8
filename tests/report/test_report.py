"""Tables, drawings, explanations and pass pages."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import ClassVar, Literal

import networkx as nx
import pytest
import torch
from pydantic import Field
from torch import nn

from irprune import api
from irprune.errors import OptionError
from irprune.ir.facts import Groups, Importance, Workspace
from irprune.ir.program import Program
from irprune.pipeline.manifest import Manifest
from irprune.pipeline.passes import Pass
from irprune.report import drawing, passes, tables
from irprune.report.explain import explain, path

Loaded = tuple[Program, Groups]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Two equal residual blocks, a head tied to nothing, an operation that sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.sort(x)[0])


@pytest.fixture(scope="module")
def stack() -> Loaded:
    return api.groups(Stack(), example_inputs=(torch.randn(2, 3),))


def text(found: list) -> str:
    return "\n".join("  " * line.depth + line.text for line in found)


def test_groups_of_repeated_blocks_share_a_row(stack: Loaded) -> None:
    _, groups = stack
    runs = [[group.name for group in run] for run in tables.alike(groups)]
    assert ["ffn0", "ffn1"] in runs
    table = tables.groups_table(groups)
    cells = [list(column.cells) for column in table.columns]
    place = cells[0].index("ffn0 … ffn1 (2 x)")
    assert [column[place] for column in cells] == [
        "ffn0 … ffn1 (2 x)",
        "ffn",
        "10",
        "yes",
        "13",
        "blocks.*.up.bias:0 blocks.*.up.weight:0 blocks.*.down.weight:1",
    ]
    assert tables.groups_table(groups, every=True).row_count == len(groups)


def test_a_parameter_is_explained_by_the_operation_that_froze_it(stack: Loaded) -> None:
    program, groups = stack
    told = text(explain(program, groups, "blocks.1.down.weight"))
    assert "ffn1: prunable, 10 indices, together with blocks.1.up.bias:0, blocks.1.up.weight:0" in told
    assert re.search(r"stays whole \([a-z-]+\): .*\n +decided by %sort = sort at .*test_report.py:\d+\n +by way of ", told)


def test_a_module_lists_its_groups_once(stack: Loaded) -> None:
    program, groups = stack
    told = explain(program, groups, "blocks")
    assert told[0].text.startswith("blocks: a module with 272 parameters in 8 tensors, 2 of ")
    assert [line.text for line in told if "prunable" in line.text][1:] == ["ffn0: prunable, 10 indices (2 groups like it)"]


def test_a_group_is_explained(stack: Loaded) -> None:
    program, groups = stack
    assert text(explain(program, groups, "ffn0")) == "\n".join(
        (
            "ffn0: a group of 10 indices, kind ffn, exact",
            "  ffn0: prunable, 10 indices",
            "  with one index go 13 parameters and 24 multiply-accumulates",
            "  written by blocks.0.up.bias:0, blocks.0.up.weight:0",
            "  read by blocks.0.down.weight:1",
        )
    )


def test_an_unknown_name_gets_the_nearest(stack: Loaded) -> None:
    with pytest.raises(OptionError, match=r"no parameter, module or group 'blocks.0.upp'; did you mean 'blocks.0.up'\?"):
        explain(*stack, "blocks.0.upp")


def test_the_path_runs_along_the_variable(stack: Loaded) -> None:
    program, groups = stack
    group = groups["ffn0"]
    (reader,) = program.holders["blocks.0.down.weight"].users
    way = path(program, group.var, "blocks.0.up.weight", reader.name)
    targets = [str(program.by_name[name].target) for name in way]
    assert targets == ["blocks.0.up.weight", "aten.linear.default", "aten.relu.default", "aten.linear.default"]


# -- drawing --------------------------------------------------------------------------------------


def diamond() -> nx.DiGraph:
    graph = nx.DiGraph()
    for name, role in {"w": "write", "%a": "operation", "%b<&>": "operation", "%c": "operation", "bias": "carry", "r": "read"}.items():
        graph.add_node(name, role=role, label=name)
    graph.add_edges_from([("w", "%a"), ("%a", "%b<&>"), ("%a", "%c"), ("%b<&>", "%c"), ("bias", "%c"), ("%c", "r")])
    return graph


def test_a_drawing_is_svg_with_data_flowing_down() -> None:
    graph = diamond()
    root = ET.fromstring(drawing.svg(graph, "a <title>"))
    space = "{http://www.w3.org/2000/svg}"
    boxes = {}
    for node in root.iter(f"{space}g"):
        rect, label = node.find(f"{space}rect"), node.find(f"{space}text")
        assert rect is not None
        assert label is not None
        boxes[label.text] = (float(rect.attrib["x"]), float(rect.attrib["y"]), float(rect.attrib["width"]))
    assert boxes.keys() == set(graph)
    assert all(boxes[a][1] < boxes[b][1] for a, b in graph.edges)
    assert boxes["bias"][1] == boxes["%b<&>"][1]
    left, right = sorted(boxes[name] for name in ("bias", "%b<&>"))
    assert left[0] + left[2] < right[0]
    assert next(root.iter(f"{space}title")).text == "%a (operation; in 1, out 2)"


def test_a_drawing_does_not_depend_on_how_the_graph_was_built() -> None:
    graph = diamond()
    other = nx.DiGraph()
    other.add_nodes_from(reversed(list(graph.nodes(data=True))))
    other.add_edges_from(reversed(list(graph.edges)))
    assert drawing.svg(other, "x") == drawing.svg(graph, "x")


def test_an_empty_graph_is_drawn() -> None:
    ET.fromstring(drawing.svg(nx.DiGraph(), "nothing"))


# -- runs -----------------------------------------------------------------------------------------


def manifest(**more: object) -> Manifest:
    sizes = {"before": {"params": 1000, "macs": 0, "bytes": 4000}, "after": {"params": 250, "macs": 0, "bytes": 1000}}
    return Manifest.model_validate({"target": "t", "pipeline": "p", "passes": [], "model": sizes, **more})


def test_only_what_was_measured_is_in_the_table() -> None:
    rows = {row.label: (row.before, row.after, row.ratio) for row in tables.run_rows(manifest())}
    assert rows == {"parameters": (1000, 250, 0.25), "multiply-accumulates": (0, 0, None), "weights, bytes": (4000, 1000, 0.25)}


def test_measures_without_a_before_have_no_ratio() -> None:
    found = manifest(
        onnx={"latency_ms": {"after": 2.0}, "file_bytes": {"before": 10, "after": 5}},
        torch_eager={"latency_ms": {"before": 4.0, "after": 3.0}},
        metrics={"before": None, "after": {"accuracy": 0.5}},
    )
    rows = {row.label: (row.before, row.after, row.ratio) for row in tables.run_rows(found)}
    assert rows["onnxruntime latency, ms"] == (None, 2.0, None)
    assert rows["ONNX file, bytes"] == (10, 5, 0.5)
    assert rows["torch latency, ms"] == (4.0, 3.0, 0.75)
    assert rows["accuracy"] == (None, 0.5, None)
    assert tables.run_table(found).row_count == len(rows)


RATIO = {"requested": {"ratio": 0.7}, "achieved": {"ratio": 0.75}}
LINES = {
    "not proven: the proof was switched off": {},
    "proven: shapes, interface, no weights to compare": {
        "shapes": True,
        "interface": True,
        "numbers": {"max_abs_err": None, "tolerance": None},
    },
    "proven: shapes, interface, numbers within 1e-06 (allowed 0.0002)": {
        "shapes": True,
        "interface": True,
        "numbers": {"max_abs_err": 1e-6, "tolerance": 2e-4},
    },
}


@pytest.mark.parametrize("line", LINES)
def test_a_run_says_what_is_proven(line: str) -> None:
    assert list(tables.run_lines(manifest(prune=RATIO, checks=LINES[line]))) == ["asked for ratio=0.7; reached 0.7500", line]


def test_many_notes_are_cut_short() -> None:
    assert list(tables.note_lines(["a", "b"], "see there")) == ["note: a", "note: b"]
    told = list(tables.note_lines([str(number) for number in range(11)], "see there"))
    assert told == [*(f"note: {number}" for number in range(8)), "note: 3 more; see there"]


# -- pass pages -----------------------------------------------------------------------------------


class Example(Pass):
    """Do one thing to ``x``.

    Before::  a
              b
    After:    c

    Raises:
        BudgetError: Never.
    """

    name: ClassVar[str] = "example"
    needs: ClassVar = (Groups,)
    uses: ClassVar = (Workspace,)
    gives: ClassVar = (Importance,)

    mode: Literal["a", "b"] = Field("a", description="One | the other.")
    level: int = Field(description="How much.", ge=1)


def test_a_page_is_made_from_the_model() -> None:
    assert passes.markdown(Example) == "\n".join(
        (
            "# example",
            "",
            "Do one thing to `x`.",
            "",
            "```",
            "Before:  a",
            "          b",
            "After:    c",
            "```",
            "",
            "Errors:",
            "",
            "- BudgetError: Never.",
            "",
            "- needs: Groups",
            "- uses: Workspace",
            "- gives: Importance",
            "- changes: nothing",
            "",
            "| option | takes | default | |",
            "|---|---|---|---|",
            "| `mode` | one of a, b | `a` | One \\| the other. |",
            "| `level` | a whole number, at least 1 | `required` | How much. |",
            "",
        )
    )
