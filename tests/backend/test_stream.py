"""Shards written block by block are the files that the library would read, also after an interruption."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from irprune.backend import stream
from irprune.backend.stream import INDEX, SINGLE, Entry, plan, write
from irprune.errors import OutputError
from irprune.pipeline.files import checksum

TENSORS = {
    "a.weight": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)),
    "b": torch.arange(6, dtype=torch.int64),
    "c.weight": torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "scale": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "flags": torch.tensor([True, False, True]),
}


def entries(tensors: dict[str, torch.Tensor] = TENSORS, fails: str = "") -> list[Entry]:
    def reader(name: str, tensor: torch.Tensor):  # type: ignore[no-untyped-def]
        def read(start: int, stop: int | None) -> torch.Tensor:
            if name == fails:
                raise KeyboardInterrupt
            return tensor if stop is None and start == 0 else tensor[start:stop]

        return read

    return [Entry(name, tensor.dtype, tuple(tensor.shape), reader(name, tensor)) for name, tensor in tensors.items()]


def read(folder: Path, digests: dict[str, str]) -> dict[str, torch.Tensor]:
    assert digests == {path.name: checksum(path) for path in sorted(folder.glob("*.safetensors"))}
    return {name: tensor for path in digests for name, tensor in load_file(folder / path).items()}


@pytest.mark.parametrize("block", [1, 24, 10**6])
@pytest.mark.parametrize("most", [1, 100, 10**6])
def test_what_is_written_is_what_is_read(most: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK", block)
    found = read(tmp_path, write(tmp_path, entries(), most=most))
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_several_shards_have_an_index(tmp_path: Path) -> None:
    names = write(tmp_path, entries(), most=100)
    index = json.loads((tmp_path / INDEX).read_text())
    assert {index["weight_map"][name] for name in TENSORS} == set(names)
    assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.itemsize for tensor in TENSORS.values())
    assert list(write(tmp_path / "one", entries(), most=10**6)) == [SINGLE]


def test_a_shard_holds_no_more_than_asked_unless_one_tensor_does() -> None:
    for part in plan(entries(), 100):
        assert sum(entry.size_bytes for entry in part) <= 100 or len(part) == 1
    assert [entry.name for part in plan(entries(), 100) for entry in part] == list(TENSORS)
    assert entries()[0].size_bytes == math.prod((7, 5)) * 4


def test_an_interrupted_write_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    undisturbed = write(tmp_path / "whole", entries(), most=60)
    known: dict[str, Any] = {"most": 60, "fingerprint": "x", "record": tmp_path / "record.json"}
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", entries(fails="c.weight"), **known)
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.safetensors")}
    assert 0 < len(there) < len(undisturbed)
    assert not list((tmp_path / "cut").glob(".*"))
    again = write(tmp_path / "cut", entries(), **known)
    assert again == undisturbed
    assert set(read(tmp_path / "cut", again)) == set(TENSORS)
    assert all((tmp_path / "cut" / name).stat().st_mtime_ns == time for name, time in there.items())


def flipped(path: Path) -> None:
    """The last byte of a file is another one; its size and its times are not."""
    data, times = bytearray(path.read_bytes()), path.stat()
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    "damage",
    [flipped, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-3]), lambda path: path.write_bytes(b"")],
    ids=["another byte", "gone", "cut off", "empty"],
)
def test_a_shard_that_changed_since_it_was_written_is_written_again(damage: Callable[[Path], object], tmp_path: Path) -> None:
    known: dict[str, Any] = {"most": 60, "fingerprint": "x", "record": tmp_path / "record.json"}
    first = write(tmp_path / "out", entries(), **known)
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in first}
    damaged, *others = sorted(first)
    damage(tmp_path / "out" / damaged)
    assert write(tmp_path / "out", entries(), **known) == first
    read(tmp_path / "out", first)
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == times[name] for name in others)


@pytest.mark.parametrize("record", ['{"fingerprint": "x"', '{"fingerprint": "x", "shards": 3}', "[]", '{"fingerprint": "y", "shards": {}}'])
def test_shards_without_a_record_of_them_are_written_again(record: str, tmp_path: Path) -> None:
    known: dict[str, Any] = {"most": 60, "fingerprint": "x", "record": tmp_path / "record.json"}
    write(tmp_path / "out", entries({name: tensor.clone() for name, tensor in TENSORS.items()}), **known)
    (tmp_path / "record.json").write_text(record)
    other = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in TENSORS.items()}
    found = read(tmp_path / "out", write(tmp_path / "out", entries(other), **known))
    assert torch.equal(found["scale"], other["scale"])


def test_shards_of_another_making_go(tmp_path: Path) -> None:
    write(tmp_path / "out", entries(), most=60, fingerprint="x", record=tmp_path / "record.json")
    other = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in TENSORS.items()}
    digests = write(tmp_path / "out", entries(other), most=10**6, fingerprint="y", record=tmp_path / "record.json")
    found = read(tmp_path / "out", digests)
    assert torch.equal(found["scale"], other["scale"])
    assert torch.equal(found["a.weight"], other["a.weight"])


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs the names of open files")
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_is_full_is_an_error_and_what_was_whole_stays(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may say so when bytes are written, or as late as when they are flushed."""
    undisturbed = write(tmp_path / "whole", entries(), most=60)
    known: dict[str, Any] = {"most": 60, "fingerprint": "x", "record": tmp_path / "record.json"}
    third, real = sorted(undisturbed)[2], getattr(os, call)

    def full(descriptor: int, *rest: Any) -> Any:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name == third:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OutputError, match=rf"{third}: cannot write: No space left on device"):
            write(tmp_path / "out", entries(), **known)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(undisturbed)[:2]
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert write(tmp_path / "out", entries(), **known) == undisturbed
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in times.items())


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write(tmp_path / "file", entries(), most=60)
