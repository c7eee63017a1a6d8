"""The vocabulary and positions, cut on request."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from irprune_passes.prune.removal import MAP, Trimmed
from torch import Tensor, nn
from torch.nn import functional as F

import irprune
from irprune.analysis.groups import discover
from irprune.errors import DataError, OptionError, ProofError
from irprune.frontend.export import trace
from irprune.ir.facts import Original, PruneReport, Workspace
from irprune.ir.program import Program
from irprune.pipeline.manager import run
from irprune.pipeline.parser import parse
from irprune.rules.infer import typed

KEPT = [7, 2, 11, 3, 0]


class Decoder(nn.Module):
    """A language model of one feed-forward block with learned positions."""

    def __init__(self, tied: bool = True, reads_ids: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6, padding_idx=3)
        self.place = nn.Embedding(9, 6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 12, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight
        self.reads_ids = reads_ids

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1]))
        if self.reads_ids:
            x = x * (tokens != 3)[..., None]
        x = self.norm(x + self.down(F.gelu(self.up(x))))
        return {"logits": self.head(x), "hidden": x}


def decoder(**options: bool) -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    model = Decoder(**options).double().eval()
    return model, trace(model, (torch.tensor([[7, 2, 9, 3], [0, 0, 11, 5]]),), dynamic={"tokens": {0: "batch", 1: "length"}})


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    path = tmp_path / "ids.txt"
    path.write_text("\n".join(map(str, KEPT)))
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_a_cut_vocabulary_answers_for_kept_tokens_as_before(tied: bool, ids: Path, tmp_path: Path) -> None:
    model, program = decoder(tied=tied)
    after, facts = run(parse(f"trim{{vocabulary={ids}}}"), program, (Workspace(tmp_path), Original(program)))
    kept = sorted(KEPT)
    assert json.loads((tmp_path / MAP).read_text()) == {"input": "tokens", "kept": kept}
    assert facts[Trimmed].ids == tuple(kept)
    assert after.tensors["embed.weight"].shape == (5, 6)
    old = torch.tensor([[7, 2, 11], [3, 0, 3], [2, 2, 2]])
    new = torch.tensor([[kept.index(int(i)) for i in row] for row in old])
    with torch.no_grad():
        expected, found = model(old), after(new)
    assert torch.allclose(found["logits"], expected["logits"][..., kept], atol=1e-12)
    assert torch.allclose(found["hidden"], expected["hidden"], atol=1e-12)
    assert facts[PruneReport].checks["numbers"]["max_abs_err"] < 1e-12


def test_fewer_positions_are_the_first_rows(tmp_path: Path) -> None:
    model, program = decoder()
    after, facts = run(parse("trim{positions=5}"), program)
    assert after.tensors["place.weight"].shape == (5, 6)
    assert facts[Trimmed].manifest() == {"trim": {"positions": 5}}
    tokens = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
    with torch.no_grad():
        assert torch.equal(after(tokens)["logits"], model(tokens)["logits"])
    with pytest.raises(OptionError, match="use places beyond positions=3"):
        run(parse("trim{positions=3}"), program)


def test_both_and_neurons_in_one_recipe(ids: Path, tmp_path: Path) -> None:
    """Pruned, then trimmed; replayed at once from the untouched program."""
    _, program = decoder()
    out = tmp_path / "run"
    first = irprune.run(
        program, f"score{{criterion=magnitude}},prune{{ratio=0.3 round_to=1}},trim{{vocabulary={ids} positions=4}}", out=out
    )
    again = irprune.run(program, f"apply{{recipe={out / 'recipe.safetensors'}}}", out=tmp_path / "again")
    tokens = torch.tensor([[0, 1, 4], [2, 3, 0]])
    with torch.no_grad():
        assert torch.equal(first.program(tokens)["logits"], again.program(tokens)["logits"])
    assert first.program.tensors["up.weight"].shape[0] < 8
    assert again.program.tensors["place.weight"].shape == (4, 6)
    assert json.loads((tmp_path / "again" / MAP).read_text()) == json.loads((out / MAP).read_text())
    assert json.loads((out / "manifest.json").read_text())["trim"] == {
        "vocabulary": {"input": "tokens", "tokens": 5, "map": MAP},
        "positions": 4,
    }


def test_they_stay_whole_unless_asked_for() -> None:
    _, program = decoder()
    groups = discover(typed(program))
    assert not {"vocabulary", "positions"} & {group.kind for group in groups.prunable}
    opened = discover(typed(program, ("vocabulary", "positions")))
    assert [(group.kind, group.size) for group in opened.prunable if group.kind in ("vocabulary", "positions")] == [
        ("vocabulary", 12),
        ("positions", 9),
    ]


def test_ids_that_the_model_reads_otherwise_forbid_the_cut(ids: Path) -> None:
    _, program = decoder(reads_ids=True)
    with pytest.raises(OptionError, match="the ids of input tokens are also read by %ne = aten::ne"):
        run(parse(f"trim{{vocabulary={ids}}}"), program)


def test_a_model_without_a_table_says_so(ids: Path) -> None:
    program = trace(nn.Linear(4, 3), (torch.randn(2, 4),))
    with pytest.raises(OptionError, match="no axis 'vocabulary' that could be cut: no input indexes a table"):
        run(parse(f"trim{{vocabulary={ids}}}"), program)
    with pytest.raises(OptionError, match="no axis 'positions' that could be cut: no table is indexed by places"):
        run(parse("trim{positions=3}"), program)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1, 2, 12]", "12 is no token id of this model \\(0 to 11\\)"),
        ("1\nx", "something else than token ids"),
        ("", "no token ids"),
        ("[true]", "True is"),
    ],
)
def test_a_bad_file_of_ids_is_refused(text: str, told: str, ids: Path) -> None:
    ids.write_text(text)
    with pytest.raises(DataError, match=told):
        run(parse(f"trim{{vocabulary={ids}}}"), decoder()[1])


def test_the_proof_sees_rows_in_another_order(ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from irprune.backend.rewrite import Shrink

    right = Shrink.slice

    def wrong(self: Shrink, tensor: Tensor, axes: tuple) -> Tensor:
        out = right(self, tensor, axes)
        return out.roll(1, 0) if out.shape == (5, 6) and tensor.shape == (12, 6) else out

    monkeypatch.setattr(Shrink, "slice", wrong)
    with pytest.raises(ProofError):
        run(parse(f"trim{{vocabulary={ids}}}"), decoder(tied=False)[1])


def test_the_masks_are_the_users() -> None:
    opened = typed(decoder()[1], ("vocabulary",))
    (group,) = [group for group in discover(opened) if group.kind == "vocabulary"]
    assert group.key == "embed.weight:0#0"
    assert np.flatnonzero(group.members[0].maps[0] >= 0).size == 12
