"""Write safetensors shards block by block, from tensors that are never in memory as a whole.

A shard appears under its name when it is complete. A record beside the directory holds what the shards are
made of and the checksum of each, so that an interrupted write goes on with those that are missing or are
not what was written; the bytes are the same as those of an undisturbed one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash

from irprune.pipeline.files import atomic, checksum, write_text, writing
from irprune.pipeline.progress import track

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK = 8 * 2**20
_FLUSH = 64 * 2**20  # so much is written between two flushes
_PIECE = 2**18  # for more at once Linux looks for pages of a megabyte and more, which can take several times as long as the write
_AHEAD = 3  # so many blocks are read before they are written
# Names of the safetensors format.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """A tensor to write.

    Attributes:
        name: Its name in the file.
        dtype: Its type.
        shape: Its shape.
        read: Rows ``start`` to ``stop`` along axis 0; the whole of a tensor without axes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[int, int | None], torch.Tensor] = field(repr=False)

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self) -> Iterator[tuple[int, int | None]]:
        """Ranges of rows of about :data:`BLOCK` bytes."""
        if not self.shape or not self.size_bytes:
            yield 0, None
            return
        rows = max(1, BLOCK * self.shape[0] // self.size_bytes)
        for start in range(0, self.shape[0], rows):
            yield start, min(start + rows, self.shape[0])


def plan(entries: Sequence[Entry], most: int) -> list[list[Entry]]:
    """Entries by shard: in order, each shard of at most ``most`` bytes unless one tensor is larger."""
    out: list[list[Entry]] = []
    size = 0
    for entry in entries:
        if not out or size + entry.size_bytes > most:
            out.append([])
            size = 0
        out[-1].append(entry)
        size += entry.size_bytes
    return out


def write(folder: Path, entries: Sequence[Entry], *, most: int, fingerprint: str = "", record: Path | None = None) -> dict[str, str]:
    """Write a checkpoint's weights as Hugging Face names its files.

    Args:
        folder: The directory.
        entries: The tensors.
        most: Bytes of a shard.
        fingerprint: What the weights are made of.
        record: Where it is noted which shards are written. Those that an earlier call with the same fingerprint
            noted there, and whose content still has the checksum that was noted, are kept; other weights in the
            directory are removed. ``None``: every shard is written.

    Returns:
        File name to checksum of each shard, in order.

    Raises:
        OutputError: A file cannot be written.
    """
    parts = plan(entries, most)
    names = [SINGLE] if len(parts) == 1 else [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    kept = _kept(folder, record, fingerprint, names)
    blocks = [
        (entry, span) for name, part in zip(names, parts, strict=True) if name not in kept for entry in part for span in entry.blocks()
    ]
    with _Ahead(track(blocks, "write weights")) as done:
        for name, part in zip(names, parts, strict=True):
            if name in kept:
                continue
            kept[name] = _shard(folder / name, part, done)
            if record is not None:
                write_text(record, json.dumps({"fingerprint": fingerprint, "shards": kept}))
    if len(parts) > 1:
        total = sum(entry.size_bytes for entry in entries)
        weight_map = {entry.name: name for name, part in zip(names, parts, strict=True) for entry in part}
        write_text(folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
    return {name: kept[name] for name in names}


def _kept(folder: Path, record: Path | None, fingerprint: str, names: Sequence[str]) -> dict[str, str]:
    """The shards that need not be written again, with their checksums; all other weights in the directory are removed."""
    there = sorted(folder.glob("*.safetensors"))
    if not there:
        return {}
    noted: dict[str, str] = {}
    if record is not None and record.is_file():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(record.read_text(encoding="utf-8"))
            noted = dict(told["shards"]) if told["fingerprint"] == fingerprint else {}
    kept = {}
    for path in track(there, "check weights that are there"):
        digest = noted.get(path.name) if path.name in names else None
        if digest is not None and checksum(path) == digest:
            kept[path.name] = digest
        else:
            with writing(path):
                path.unlink()
    return kept


class _Ahead:
    """Reads the next blocks while one is written."""

    def __init__(self, blocks: Iterable[tuple[Entry, tuple[int, int | None]]]) -> None:
        self._blocks = iter(blocks)
        self._pool = ThreadPoolExecutor(1)
        self._next = deque(self._pool.submit(_read, *block) for block in itertools.islice(self._blocks, _AHEAD))

    def take(self) -> torch.Tensor:
        ready = self._next.popleft()
        self._next.extend(self._pool.submit(_read, *block) for block in itertools.islice(self._blocks, 1))
        return ready.result()

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *what: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _read(entry: Entry, span: tuple[int, int | None]) -> torch.Tensor:
    block = entry.read(*span).to(entry.dtype).contiguous()
    return block.reshape(-1).view(torch.uint8)


def _header(part: Sequence[Entry]) -> bytes:
    """The start of a safetensors file: the length of a JSON object and the object, padded to eight bytes."""
    listed: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in part:
        end = offset + entry.size_bytes
        listed[entry.name] = {"dtype": _DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(listed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _shard(path: Path, part: Sequence[Entry], done: _Ahead) -> str:
    """Write one shard. Returns its checksum.

    While a block is written, the next ones are read, and what was written before is on its way to the disk.
    """
    digest = xxhash.xxh3_128()
    with atomic(path) as place, place.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as flushing:
        header = _header(part)
        digest.update(header)
        file.write(header)
        flushed: Future[None] | None = None
        waiting = 0
        for entry in part:
            for _ in entry.blocks():
                data = done.take().numpy().data
                digest.update(data)
                _write_all(file.fileno(), data)
                waiting += data.nbytes
                if waiting >= _FLUSH and (flushed is None or flushed.done()):
                    if flushed is not None:
                        flushed.result()
                    flushed, waiting = flushing.submit(os.fsync, file.fileno()), 0
        if flushed is not None:
            flushed.result()
    return digest.hexdigest()


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data[:_PIECE]) :]
