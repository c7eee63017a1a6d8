"""Shards written block by block are the files that the library would read, also after an interruption."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from irprune.backend import stream
from irprune.backend.stream import INDEX, SINGLE, Entry, plan, write
from irprune.errors import OutputError
from irprune.pipeline.files import sha256

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
    assert digests == {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    return {name: tensor for path in digests for name, tensor in load_file(folder / path).items()}


@pytest.mark.parametrize("block", [1, 24, 10**6])
@pytest.mark.parametrize("most", [1, 100, 10**6])
def test_what_is_written_is_what_is_read(most: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK", block)
    found = read(tmp_path, write(tmp_path, entries(), most=most, fingerprint="x"))
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_several_shards_have_an_index(tmp_path: Path) -> None:
    names = write(tmp_path, entries(), most=100, fingerprint="x")
    index = json.loads((tmp_path / INDEX).read_text())
    assert {index["weight_map"][name] for name in TENSORS} == set(names)
    assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.itemsize for tensor in TENSORS.values())
    assert list(write(tmp_path / "one", entries(), most=10**6, fingerprint="x")) == [SINGLE]


def test_a_shard_holds_no_more_than_asked_unless_one_tensor_does() -> None:
    for part in plan(entries(), 100):
        assert sum(entry.size_bytes for entry in part) <= 100 or len(part) == 1
    assert [entry.name for part in plan(entries(), 100) for entry in part] == list(TENSORS)
    assert entries()[0].size_bytes == math.prod((7, 5)) * 4


def test_an_interrupted_write_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    undisturbed = write(tmp_path / "whole", entries(), most=60, fingerprint="x")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", entries(fails="c.weight"), most=60, fingerprint="x")
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.safetensors")}
    assert 0 < len(there) < len(undisturbed)
    assert not list((tmp_path / "cut").glob(".*"))
    again = write(tmp_path / "cut", entries(), most=60, fingerprint="x")
    assert again == undisturbed
    assert set(read(tmp_path / "cut", again)) == set(TENSORS)
    assert all((tmp_path / "cut" / name).stat().st_mtime_ns == time for name, time in there.items())


def test_a_shard_of_another_making_or_cut_off_is_written_again(tmp_path: Path) -> None:
    first = write(tmp_path, entries(), most=60, fingerprint="x")
    cut = tmp_path / next(iter(first))
    cut.write_bytes(cut.read_bytes()[:-3])
    other = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in TENSORS.items()}
    found = read(tmp_path, write(tmp_path, entries(other), most=60, fingerprint="y"))
    assert torch.equal(found["scale"], other["scale"])
    assert torch.equal(found["a.weight"], other["a.weight"])


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write(tmp_path / "file", entries(), most=60, fingerprint="x")
