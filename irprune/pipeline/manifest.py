"""``manifest.json``: what a run did, in numbers."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from irprune.errors import DataError
from irprune.ir.facts import Fact, Note, PruneReport
from irprune.pipeline.files import sha256, write_text
from irprune.pipeline.instruments import Timed

NAME = "manifest.json"


class _Part(BaseModel):
    """A part of the manifest. Notes of passes may add to it."""

    model_config = ConfigDict(extra="allow")


class Applied(_Part):
    """One pass of the run.

    Attributes:
        name: The pass.
        options: All of them, the defaults too.
        seconds: How long it took.
    """

    name: str
    options: dict[str, Any]
    seconds: float


class Size(_Part):
    """How large a program is.

    Attributes:
        params: Number of parameters (buffers are not counted).
        macs: Multiply-accumulates of one call with the example inputs.
        bytes: Bytes of all parameters and buffers.
    """

    params: int
    macs: int
    bytes: int


class Sizes(_Part):
    """Before the first pass and after the last."""

    before: Size
    after: Size


class Numbers(_Part):
    """The pruned program against the masked original; ``None`` where there were no weights to compare."""

    max_abs_err: float | None
    tolerance: float | None


class Checks(_Part):
    """What translation validation found; ``None`` where it did not run."""

    shapes: bool | None = None
    numbers: Numbers | None = None
    interface: bool | None = None


class Ratio(_Part):
    """What ``prune`` was asked for and what it reached.

    Attributes:
        requested: The ratio or count with its unit.
        achieved: The reached ratio under ``ratio``, and that of each unit.
        kept: Group name to indices kept and their number before.
    """

    requested: dict[str, Any]
    achieved: dict[str, float]
    kept: dict[str, tuple[int, int]] = Field(default_factory=dict)


class Pair(_Part):
    """A figure before and after; ``before`` is missing where only the result was measured."""

    before: float | None = None
    after: float


class Onnx(_Part):
    """The ONNX file: what was found by comparing it with the program, and its speed."""

    parity_max_abs_err: float | None = None
    latency_ms: Pair | None = None


class Metrics(_Part):
    """What the user's ``evaluate`` says, by name."""

    before: dict[str, float] | None = None
    after: dict[str, float] | None = None


class File(_Part):
    """A file of the run directory."""

    bytes: int
    sha256: str


class Manifest(_Part):
    """What a run did.

    Attributes:
        irprune: Version of irprune.
        torch: Version of torch.
        python: Version of Python.
        platform: Machine and system.
        target: What the user named.
        seed: Seed of everything random.
        pipeline: The passes as text; ``irprune run TARGET --passes`` takes it.
        passes: The passes with their options and times, filled-in ones included.
        model: Size before and after.
        prune: Requested and achieved ratio; ``None`` where nothing was pruned.
        checks: What translation validation found.
        onnx: The ONNX file; ``None`` where none was written.
        metrics: Quality before and after.
        files: The files of the run directory by name, this one left out.
        notes: What the user may want to know, one sentence each.
    """

    irprune: str = Field(default_factory=lambda: version("irprune"))
    torch: str = Field(default_factory=lambda: version("torch"))
    python: str = Field(default_factory=lambda: sys.version.split()[0])
    platform: str = Field(default_factory=platform.platform)
    target: str
    seed: int = 0
    pipeline: str
    passes: tuple[Applied, ...]
    model: Sizes
    prune: Ratio | None = None
    checks: Checks = Checks()
    onnx: Onnx | None = None
    metrics: Metrics = Metrics()
    files: dict[str, File] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def write(self, folder: Path) -> Path:
        """Write ``manifest.json``. Raises OutputError where that fails."""
        path = folder / NAME
        write_text(path, self.model_dump_json(indent=2) + "\n")
        return path

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a run directory.

        Raises:
            DataError: It is not there, or not a manifest.
        """
        path = folder / NAME
        hint = "name the directory of a run that has ended"
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"the manifest cannot be read: {error.strerror}", where=str(path), hint=hint) from error
        except (ValidationError, UnicodeDecodeError) as error:
            raise DataError(f"the file is not a manifest: {str(error).splitlines()[0]}", where=str(path), hint=hint) from error


def applied(steps: Iterable[Timed]) -> list[dict[str, Any]]:
    """The passes that ran, in the manifest's form."""
    return [{"name": step.of.name, "options": step.of.model_dump(mode="json"), "seconds": step.seconds} for step in steps]


def noted(facts: Iterable[Fact]) -> dict[str, Any]:
    """What the notes of passes add to the manifest.

    A :class:`Note` may have a method ``manifest() -> dict``; the results are merged deeply.
    """
    out: dict[str, Any] = {}
    for fact in facts:
        if isinstance(fact, PruneReport):
            kept = {name: list(pair) for name, pair in fact.kept.items()}
            ratio = {"requested": dict(fact.requested), "achieved": dict(fact.achieved), "kept": kept}
            out = merged(out, {"prune": ratio, "checks": dict(fact.checks)})
        elif isinstance(fact, Note) and hasattr(fact, "manifest"):
            out = merged(out, fact.manifest())
    return out


def merged(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; where both say something, the second is right."""
    out = dict(a)
    for key, value in b.items():
        old = out.get(key)
        out[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def hashes(folder: Path) -> dict[str, File]:
    """Size and SHA-256 of each file in a run directory and below, but the manifest and what is hidden."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    shown = sorted(name for name in names if name != NAME and not any(part.startswith(".") for part in name.split("/")))
    return {name: File(bytes=names[name].stat().st_size, sha256=sha256(names[name])) for name in shown}
