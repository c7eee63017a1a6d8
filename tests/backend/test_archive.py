"""``model.pt2``: a program as a ``torch.export`` archive."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from irprune.analysis.groups import discover
from irprune.backend import archive
from irprune.backend.archive import _Sink, save_pt2, to_exported
from irprune.backend.rewrite import remove
from irprune.errors import OutputError, ParityError
from irprune.frontend.export import trace
from irprune.ir.program import Program
from irprune.rules.infer import typed

Pair = namedtuple("Pair", "first second")


@dataclass
class Answer:
    """An output class that only the model's own source knows."""

    logits: torch.Tensor
    extra: Pair


torch.export.register_dataclass(Answer, serialized_type_name="test_archive.Answer")


class Everything(nn.Module):
    """A tied weight, a persistent buffer, one that is not, a constant, a name that collides, keywords, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.p = nn.ParameterDict({"a_weight": nn.Parameter(torch.randn(4))})
        self.register_buffer("shift", torch.randn(4))
        self.register_buffer("cache", torch.randn(4), persistent=False)
        self.constant = torch.arange(4)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor, flag: Any = None, times: int = 1) -> dict[str, Any]:
        y = self.b(self.a(x) + self.shift + self.cache + self.constant) * times + self.p["a_weight"]
        return {"answer": Answer(y, Pair(y * scale, y.shape[0])), "nothing": None}


def everything(batch: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(batch, 4),), {"scale": torch.randn(batch, 1), "flag": None, "times": 3}


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    args, kwargs = everything()
    return trace(Everything(), args, kwargs)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_archive_answers_as_the_program(program: Program, tmp_path: Path, batch: int) -> None:
    save_pt2(program, tmp_path / "model.pt2")
    loaded = torch.export.load(str(tmp_path / "model.pt2"))
    args, kwargs = everything(batch)
    want, have = program(*args, **kwargs), loaded.module()(*args, **kwargs)
    assert pytree.tree_structure(have) == pytree.tree_structure(
        {"answer": {"logits": 0, "extra": {"first": 0, "second": 0}}, "nothing": None}
    )
    torch.testing.assert_close(pytree.tree_leaves(have), pytree.tree_leaves(want), rtol=0, atol=0)
    assert set(loaded.state_dict) == set(program.tensors)
    assert os.listdir(tmp_path) == ["model.pt2"]


def test_the_archive_needs_neither_irprune_nor_the_model(program: Program, tmp_path: Path) -> None:
    save_pt2(program, tmp_path / "model.pt2")
    script = (
        "import sys, torch; m = torch.export.load(sys.argv[1]).module()\n"
        "print(m(torch.ones(3, 4), scale=torch.ones(3, 1), flag=None, times=3)['answer']['extra']['second'])\n"
        "assert not any(name.startswith('irprune') for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pt2")], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


def test_lifting_shares_the_tensors_and_leaves_the_program(program: Program) -> None:
    before = str(program.module.graph)
    exported = to_exported(program)
    assert all(exported.state_dict[name] is tensor for name, tensor in program.tensors.items())
    assert str(program.module.graph) == before
    assert {str(bounds) for bounds in exported.range_constraints.values()} == {"VR[2, int_oo]"}


def test_lifting_a_pruned_program() -> None:
    program = typed(trace(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (torch.randn(2, 4),)))
    group = discover(program).prunable[0]
    exported = to_exported(remove(program, {group.var: np.array([True, False, True, False, True, False])}))
    values = [node.meta["val"] for node in exported.graph.nodes if node.op != "output"]
    shapes = [re.sub(r"s\d+", "s", str(list(value.shape))) for value in values]
    assert shapes == ["[3, 4]", "[3]", "[2, 3]", "[2]", *(f"[s, {size}]" for size in (4, 3, 3, 2))]
    assert exported.module()(torch.ones(3, 4)).shape == (3, 2)


def test_torch_decomposes_and_retraces_it(program: Program) -> None:
    args, kwargs = everything(3)
    decomposed = to_exported(program).run_decompositions()
    have = pytree.tree_leaves(decomposed.module()(*args, **kwargs))
    torch.testing.assert_close(have, pytree.tree_leaves(program(*args, **kwargs)))


def test_an_archive_that_answers_differently_is_refused(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lifted = archive.to_exported

    def wrong(program: Program) -> Any:
        exported = lifted(program)
        exported.state_dict["b.bias"] = nn.Parameter(exported.state_dict["b.bias"].detach() + 1)
        return exported

    monkeypatch.setattr(archive, "to_exported", wrong)
    with pytest.raises(ParityError, match=r"output 0 of the archive differs from the program: Tensor-likes are not close"):
        save_pt2(program, tmp_path / "model.pt2")
    assert os.listdir(tmp_path) == []


class FullDisk(io.BytesIO):
    """A file on a disk with place for ``room`` bytes."""

    room = 3000

    def write(self, data: Any) -> int:
        if self.tell() + memoryview(data).nbytes > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_does_not_end_the_process(program: Program) -> None:
    sink = _Sink(FullDisk())
    torch.export.save(to_exported(program), sink)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="No space left on device"):
        sink.check()


def test_an_unwritable_place_is_one_clear_error(program: Program, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="cannot write"):
        save_pt2(program, tmp_path / "out" / "model.pt2")


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


def test_an_archive_that_draws_numbers_is_compared_on_the_same_ones(tmp_path: Path) -> None:
    save_pt2(trace(Noisy(), (torch.randn(3, 4),), check=False), tmp_path / "model.pt2")
    assert torch.export.load(tmp_path / "model.pt2").module()(torch.zeros(3, 4)).shape == (3, 4)
