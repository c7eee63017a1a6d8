"""``manifest.json``: what a run did, in numbers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from toy_passes import Cut, Paint

import irprune
from irprune.errors import DataError
from irprune.ir.facts import Note, PruneReport, Task
from irprune.pipeline.instruments import Timed
from irprune.pipeline.manifest import Manifest, applied, hashes, merged, noted


@dataclass(frozen=True)
class Exported(Note):
    error: float

    def manifest(self) -> dict[str, Any]:
        return {"onnx": {"parity_max_abs_err": self.error, "opset": 20}, "colour": "blue"}


@dataclass(frozen=True)
class Measured(Note):
    def manifest(self) -> dict[str, Any]:
        return {"onnx": {"latency_ms": {"before": 2.0, "after": 1.0}}, "metrics": {"after": {"accuracy": 0.5}}}


REPORT = PruneReport(
    {"ratio": 0.5, "of": "params"},
    {"ratio": 0.51, "params": 0.51},
    keep={},
    kept={"ffn0": (3, 6)},
    checks={"shapes": True, "numbers": {"max_abs_err": 1e-7, "tolerance": 1e-4}, "interface": True},
)


def manifest(*notes: Note) -> Manifest:
    sizes = {"before": {"params": 10, "macs": 20, "bytes": 40}, "after": {"params": 5, "macs": 9, "bytes": 20}}
    facts = noted([Task("toy"), *notes])
    passes = applied([Timed(Paint(), 0.5), Timed(Cut(ratio=0.25), 1.5)])
    return Manifest.model_validate({"target": "toy", "pipeline": "paint,cut", "passes": passes, "model": sizes, **facts})


def test_the_file_has_what_is_promised(tmp_path: Path) -> None:
    path = manifest(REPORT, Exported(2e-6), Measured()).write(tmp_path)
    read = json.loads(path.read_text())
    assert read["irprune"] == irprune.__version__
    assert read["torch"].startswith("2.")
    assert read["target"] == "toy"
    assert [(one["name"], one["seconds"]) for one in read["passes"]] == [("paint", 0.5), ("cut", 1.5)]
    assert read["passes"][0]["options"] == {"skip": []}
    assert read["passes"][1]["options"]["ratio"] == 0.25
    assert read["model"] == {"before": {"params": 10, "macs": 20, "bytes": 40}, "after": {"params": 5, "macs": 9, "bytes": 20}}
    assert read["checks"] == {"shapes": True, "numbers": {"max_abs_err": 1e-7, "tolerance": 1e-4}, "interface": True}
    assert read["prune"] == {
        "requested": {"ratio": 0.5, "of": "params"},
        "achieved": {"ratio": 0.51, "params": 0.51},
        "kept": {"ffn0": [3, 6]},
    }
    assert read["onnx"] == {"parity_max_abs_err": 2e-6, "opset": 20, "latency_ms": {"before": 2.0, "after": 1.0}}
    assert read["metrics"] == {"before": None, "after": {"accuracy": 0.5}}
    assert read["colour"] == "blue"


def test_what_was_not_done_is_null(tmp_path: Path) -> None:
    read = json.loads(manifest().write(tmp_path).read_text())
    assert (read["prune"], read["onnx"], read["checks"]) == (None, None, {"shapes": None, "numbers": None, "interface": None})


def test_it_reads_back(tmp_path: Path) -> None:
    written = manifest(REPORT, Exported(2e-6), Measured())
    written.write(tmp_path)
    assert Manifest.read(tmp_path) == written


def test_later_notes_win_and_others_stay() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "d": {"e": 5}}) == {"a": {"b": 4, "c": 2}, "d": {"e": 5}}


def test_files_are_hashed_but_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"abc")
    (tmp_path / "manifest.json").write_text("{}")
    found = hashes(tmp_path)
    assert list(found) == ["model.onnx"]
    assert (found["model.onnx"].bytes, found["model.onnx"].sha256) == (3, hashlib.sha256(b"abc").hexdigest())


BAD = {None: "the manifest cannot be read: No such file or directory", "{": "the file is not a manifest: 1 validation error for Manifest"}


@pytest.mark.parametrize("text", BAD)
def test_a_directory_without_a_manifest(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError) as caught:
        Manifest.read(tmp_path)
    assert str(caught.value) == f"[data] at {tmp_path}/manifest.json: {BAD[text]}\n  to go on: name the directory of a run that has ended"
