"""Files appear under their name only when whole."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from irprune.errors import IrpruneError, OutputError

PART = ".irprune-part"
PARTIAL = ".partial"
_COMPLETE = "complete"
# What libraries that write files themselves say where Python would raise OSError.
_WRITER_FAILURES = ("PytorchStreamWriter", "os error ", "No space left on device", "unexpected pos ")


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file so that it appears under its name only when whole.

    Yields a path with the same file name in a fresh hidden directory next to the target, so the body
    may also write companions beside it (external data of an ONNX file). When the body ends, everything
    in there is flushed to disk and renamed into place, the file itself last. When it raises, all of it
    is removed and what stood under the name before is untouched.

    Raises:
        OutputError: The body or the renaming failed to write (disk full, no permission …); the error
            names the path and the cause.
    """
    path = Path(path)
    folder: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent))
        part = folder / path.name
        yield part
        written = sorted(folder.iterdir(), key=lambda file: file == part)
        assert part in written, f"nothing was written for {path}"
        for file in written:
            flush(file)
        for file in written:
            os.replace(file, path.parent / file.name)
    except OSError as error:
        raise unwritable(path, error.strerror or str(error)) from error
    except Exception as error:
        if any(sign in str(error) for sign in _WRITER_FAILURES):
            raise unwritable(path, str(error).splitlines()[0]) from error
        raise
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Stage:
    """A directory that is being filled.

    Attributes:
        folder: Where to write. Its folder ``.partial`` is for progress, and is gone in the end.
        place: Where it appears when it is complete.
        resumed: Something was left there by a process that was killed.
        complete: All of it was there, only the last renaming was left to do: write nothing.
    """

    folder: Path
    place: Path
    resumed: bool = False
    complete: bool = False


class Interrupted(KeyboardInterrupt):
    """An interruption after which a run can go on; the text says how."""


class _Lock:
    """One process at a time fills a directory. The system lets go of the lock when the process ends, however it ends."""

    def __init__(self, folder: Path, place: Path) -> None:
        try:
            import fcntl
        except ImportError:  # a system without such locks
            self._descriptor = None
            return
        self._descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            text = "another process is writing this directory"
            raise OutputError(text, where=str(place), hint="wait for it to end, or give another place with --out") from error

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


@contextmanager
def staged(
    path: str | os.PathLike[str],
    *,
    numbered: bool = False,
    force: bool = False,
    artefacts: Collection[str] = (),
    last: str | None = None,
    resume: bool = False,
) -> Iterator[Stage]:
    """Fill a directory so that it appears under its name only when complete.

    Its files are written into a hidden directory. When the body ends that takes its place; when the
    body raises, nothing of it stays. The name is reserved at once, so a place that cannot be written is
    found before the work. A directory that is there already stays and gets the files.

    Args:
        path: The directory; it may exist if it is empty.
        numbered: Take the first free ``<path>-<n>`` instead.
        force: Also take a directory that is not empty. Files of the same names are replaced, other
            files stay.
        artefacts: File names that are removed from such a directory where the body has not written them.
        last: The file that appears last in such a directory, and is removed first.
        resume: Go on in the hidden directory that a killed process left (with ``numbered``, the newest
            one), if there is one, and leave it there when the body raises.

    Raises:
        OutputError: The directory is not empty, cannot be written, or is being written by another process.
    """
    path = Path(path)
    if resume and numbered:
        path, numbered = _newest_unfinished(path)
    inner, beside = path / PART, path.parent / f".{path.name}{PART}"
    left = next((one for one in (inner, beside) if one.is_dir()), None) if resume and not numbered else None
    there = left == inner if left is not None else path.is_dir() and not numbered
    made = [] if there else [folder for folder in path.parents if not folder.exists()]
    folder, lock = None, None
    done = False
    try:
        with writing(path):
            if left is None and there and any(path.iterdir()) and not force:
                hint = "give another place with --out, or replace it with --force"
                raise OutputError("the directory is not empty", where=str(path), hint=hint)
            if left is None and there and beside.is_dir():
                # What a killed process left, which had made the directory as well; one that still writes there has the lock.
                _Lock(beside, path).release()
                remove(beside)
            if not there:
                path.parent.mkdir(parents=True, exist_ok=True)
                if left is None:
                    path = _reserved(path, numbered)
                path.mkdir(exist_ok=True)
                made.insert(0, path)
            wanted = path / PART if there else path.parent / f".{path.name}{PART}"
            wanted.mkdir(exist_ok=True)
            lock = _Lock(wanted, path)
            folder = wanted
            for inside in folder.iterdir():
                if left is None or inside.name.endswith(PART):
                    remove(inside)
            complete = (folder / PARTIAL / _COMPLETE).is_file()
        yield Stage(folder, path, left is not None, complete)
        with writing(path):
            if not complete:
                names = sorted(file.name for file in folder.iterdir() if file.name != PARTIAL)
                write_text(folder / PARTIAL / _COMPLETE, "\n".join(names))
            if there:
                _merge(folder, path, artefacts, last)
            else:
                os.replace(folder, path)
                shutil.rmtree(path / PARTIAL, ignore_errors=True)
        done = True
    except IrpruneError as error:
        # The user knows the directory by the name that it will have.
        if folder is not None and error.where is not None and error.where.startswith(str(folder)):
            error.where = f"{path}{error.where.removeprefix(str(folder))}"
        raise
    except KeyboardInterrupt as error:
        if resume:
            raise Interrupted(f"interrupted; what is done is kept for --resume in {path}") from error
        raise
    finally:
        keep = resume and not done
        if folder is not None and not keep:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            lock.release()
        for one in () if done or keep else made:
            with suppress(OSError):
                one.rmdir()


def _newest_unfinished(path: Path) -> tuple[Path, bool]:
    """The ``<path>-<n>`` of the highest number that a killed process left; where there is none, the path and True."""
    pattern = re.compile(rf"\.{re.escape(path.name)}-(\d+){re.escape(PART)}")
    found = [int(match[1]) for one in path.parent.glob(f".*{PART}") if (match := pattern.fullmatch(one.name))]
    return (path.with_name(f"{path.name}-{max(found)}"), False) if found else (path, True)


def _reserved(path: Path, numbered: bool) -> Path:
    """The new empty directory ``path``, or the first free ``<path>-<n>``."""
    for number in itertools.count(1):
        place = path.with_name(f"{path.name}-{number}") if numbered else path
        try:
            place.mkdir()
        except FileExistsError:
            if not numbered:
                raise
        else:
            break
    return place


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses in a block is an error that names a path."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error.strerror or str(error)) from error


def _merge(stage: Path, path: Path, artefacts: Collection[str], last: str | None) -> None:
    if last is not None and (stage / last).exists():
        (path / last).unlink(missing_ok=True)
    written = sorted((file for file in stage.iterdir() if file.name != PARTIAL), key=lambda file: file.name == last)
    names = (stage / PARTIAL / _COMPLETE).read_text(encoding="utf-8").splitlines()
    for name in set(artefacts) - set(names):
        remove(path / name)
    for file in written:
        if file.is_dir():
            remove(path / file.name)
        os.replace(file, path / file.name)


def remove(path: Path) -> None:
    """Remove a file, or a directory with what is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole text file, as :func:`atomic` does."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def unwritable(path: str | os.PathLike[str], cause: str) -> OutputError:
    """The error for a path that cannot be written."""
    return OutputError(f"cannot write: {cause}", where=str(path), hint="give another place with --out, or free space there")


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: str | os.PathLike[str]) -> str:
    """The XXH3 checksum (128 bits) of a file's content, in hexadecimal.

    For what irprune writes and reads back itself: it finds damage as SHA-256 does, twenty times as fast, and is
    no proof against somebody who makes a file on purpose.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def flush(file: Path) -> None:
    """Wait until a file, or what a directory lists, is on the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def readable(folder: Path) -> None:
    """Give a directory and what is in it the permissions of new files: libraries and temporary directories give the user's own only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
