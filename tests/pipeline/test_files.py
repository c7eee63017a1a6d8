"""Files appear under their name only when whole."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from irprune.errors import OutputError
from irprune.pipeline.files import atomic, checksum, sha256, staged, write_text


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_name_appears_when_the_body_ends(tmp_path: Path) -> None:
    with atomic(tmp_path / "a" / "model.bin") as part:
        part.write_bytes(b"whole")
        assert part.name == "model.bin"
        assert not (tmp_path / "a" / "model.bin").exists()
    assert listing(tmp_path) == ["a", "a/model.bin"]
    assert (tmp_path / "a" / "model.bin").read_bytes() == b"whole"


def test_companions_come_along(tmp_path: Path) -> None:
    with atomic(tmp_path / "model.onnx") as part:
        part.write_bytes(b"graph")
        part.with_name("model.onnx.data").write_bytes(b"weights")
    assert listing(tmp_path) == ["model.onnx", "model.onnx.data"]


def write_half(path: Path, error: BaseException) -> None:
    with atomic(path) as part:
        part.write_bytes(b"half")
        raise error


@pytest.mark.parametrize("error", [ValueError("ours"), KeyboardInterrupt()])
def test_a_failing_body_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "model.bin").write_bytes(b"before")
    with pytest.raises(type(error)):
        write_half(tmp_path / "model.bin", error)
    assert listing(tmp_path) == ["model.bin"]
    assert (tmp_path / "model.bin").read_bytes() == b"before"


def full_disk(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    path = tmp_path / "model.bin"
    with pytest.raises(OutputError) as caught:
        write_text(path, "text")
    assert str(caught.value) == (
        f"[output] at {path}: cannot write: No space left on device\n  to go on: give another place with --out, or free space there"
    )
    assert listing(tmp_path) == []


def test_a_library_that_reports_a_full_disk_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="PytorchStreamWriter failed writing file"):
        write_half(tmp_path / "model.pt2", RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"))
    assert listing(tmp_path) == []


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot write: (Not a directory|File exists)"):
        write_text(tmp_path / "out" / "manifest.json", "{}")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_checksum(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert checksum(tmp_path / "a") == "06b05ab6733a618578af5f94892f3950"


def fill(path: Path, error: BaseException | None = None, **options: object) -> None:
    with staged(path, **options) as stage:  # type: ignore[arg-type]
        (stage.folder / "model.bin").write_text("new")
        (stage.folder / "manifest.json").write_text("new")
        assert not (path / "model.bin").exists() or (path / "model.bin").read_text() == "old"
        if error is not None:
            raise error


def test_a_directory_appears_when_complete(tmp_path: Path) -> None:
    fill(tmp_path / "runs" / "toy")
    assert listing(tmp_path) == ["runs", "runs/toy", "runs/toy/manifest.json", "runs/toy/model.bin"]


def test_numbered_directories_are_reserved_at_once(tmp_path: Path) -> None:
    with staged(tmp_path / "runs" / "toy", numbered=True) as first, staged(tmp_path / "runs" / "toy", numbered=True) as second:
        assert [first.place.name, second.place.name] == ["toy-1", "toy-2"]
    assert listing(tmp_path) == ["runs", "runs/toy-1", "runs/toy-2"]
    with pytest.raises(ValueError):
        fill(tmp_path / "runs" / "toy", ValueError("ours"), numbered=True)
    assert listing(tmp_path) == ["runs", "runs/toy-1", "runs/toy-2"]


def test_a_directory_that_is_there_stays_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(Path("."))
    assert listing(Path.cwd()) == listing(tmp_path) == ["manifest.json", "model.bin"]


@pytest.mark.parametrize("error", [FileNotFoundError("ours"), KeyboardInterrupt(), OutputError("full")])
def test_a_failure_leaves_no_directory(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        fill(tmp_path / "runs" / "toy-1", error)
    assert listing(tmp_path) == []


def test_a_directory_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("old")
    with pytest.raises(OutputError) as caught:
        fill(tmp_path)
    assert str(caught.value) == (
        f"[output] at {tmp_path}: the directory is not empty\n  to go on: give another place with --out, or replace it with --force"
    )
    assert listing(tmp_path) == ["mine.txt"]


def old_run(path: Path) -> list[str]:
    path.mkdir()
    for name in ("manifest.json", "model.bin", "model.onnx", "mine.txt"):
        (path / name).write_text("old")
    return listing(path)


def test_force_replaces_what_a_run_writes_and_nothing_else(tmp_path: Path) -> None:
    old_run(tmp_path / "out")
    fill(tmp_path / "out", force=True, artefacts=("manifest.json", "model.bin", "model.onnx"), last="manifest.json")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {
        "manifest.json": "new",
        "model.bin": "new",
        "mine.txt": "old",
    }
    assert listing(tmp_path) == ["out", "out/manifest.json", "out/mine.txt", "out/model.bin"]


def test_force_that_fails_leaves_the_old_run(tmp_path: Path) -> None:
    before = old_run(tmp_path / "out")
    with pytest.raises(ValueError):
        fill(tmp_path / "out", ValueError("ours"), force=True, artefacts=("model.onnx",), last="manifest.json")
    assert listing(tmp_path / "out") == before
    assert listing(tmp_path) == ["out", *(f"out/{name}" for name in before)]


def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot write: (Not a directory|File exists)"):
        fill(tmp_path / "file" / "out", AssertionError("the body must not run"))
