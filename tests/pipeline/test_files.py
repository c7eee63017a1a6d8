"""Files appear under their name only when whole."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from irprune.errors import OutputError
from irprune.pipeline.files import atomic, sha256, write_text


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
