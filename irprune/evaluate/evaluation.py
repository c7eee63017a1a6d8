"""A target's perplexity and accuracy: which model is asked, which tokenizer reads, what is kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from irprune.errors import DataError, OptionError, TargetError
from irprune.evaluate.perplexity import WINDOW, Perplexity, perplexity, read_text, tokenised
from irprune.evaluate.predictor import Predictor
from irprune.evaluate.renumbered import Renumbered, kept_ids
from irprune.evaluate.tasks import Accuracy, Document, accuracy, averages, documents, lm_eval
from irprune.ir.program import Program
from irprune.pipeline import manifest
from irprune.pipeline.files import write_text
from irprune.pipeline.progress import doing
from irprune.quiet import quiet_transformers

NAME = "evaluation.json"
BACKENDS = ("auto", "torch", "onnx")


@dataclass(frozen=True)
class Evaluation:
    """What a model was found to be worth.

    Attributes:
        target: What the user named.
        backend: What ran it: ``torch`` or ``onnx``.
        device: Where: ``cpu`` or ``cuda``.
        texts: Perplexity by name of the text.
        tasks: Accuracy by name of the task.
    """

    target: str
    backend: str
    device: str
    texts: Mapping[str, Perplexity] = field(default_factory=dict)
    tasks: Mapping[str, Accuracy] = field(default_factory=dict)

    @property
    def data(self) -> dict[str, Any]:
        """Everything as plain data, with the averages over the tasks."""
        return {**dataclasses.asdict(self), "average": averages(self.tasks)}

    def write(self, folder: Path) -> Path:
        """Write ``evaluation.json``. Raises OutputError where that fails."""
        write_text(folder / NAME, json.dumps(self.data, indent=2) + "\n")
        return folder / NAME


@dataclass(frozen=True)
class Questions:
    """What a model is asked, read and checked before it is loaded.

    Attributes:
        texts: Content by name.
        tasks: Documents by name.
        window: Tokens in a window of text.
        windows: Most windows of each text.
        batch: Windows of text in one call.
        limit: Most documents of each task.
    """

    texts: Mapping[str, str]
    tasks: Mapping[str, Sequence[Document]]
    window: int = WINDOW
    windows: int | None = None
    batch: int = 8
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.texts and not self.tasks:
            raise OptionError("there is nothing to evaluate on", hint="give --text FILE, --tasks NAME=FILE or --tasks-dir DIR")
        for name, least in (("window", 2), ("windows", 1), ("batch", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"{name} is {value}", hint=f"give {least} or more")
        if self.tasks:
            lm_eval()

    @classmethod
    def read(cls, texts: Mapping[str, Path], tasks: Mapping[str, Path], *, samples: str = "lines", **options: Any) -> Questions:
        """Questions from files, with the options of the class; ``samples`` as :func:`read_text` takes it."""
        read = {name: read_text(path, samples) for name, path in texts.items()}
        return cls(read, {name: documents(path) for name, path in tasks.items()}, **options)


def evaluated(predict: Predictor, tokenizer: Any, questions: Questions, *, target: str = "", backend: str = "torch") -> Evaluation:
    """Measure a model on texts and tasks."""
    texts = {}
    for name, text in questions.texts.items():
        with doing(f"tokenise {name}"):
            tokens = tokenised(tokenizer, text)
        texts[name] = perplexity(predict, tokens, questions.window, questions.windows, batch=questions.batch, label=name)
    budget = questions.batch * questions.window
    tasks = accuracy(predict, tokenizer, questions.tasks, limit=questions.limit, batch_tokens=budget) if questions.tasks else {}
    return Evaluation(target, backend, predict.device, texts, tasks)


def of_program(program: Program, backend: str, scratch: Path) -> tuple[Predictor, str]:
    """A program as a predictor; for onnxruntime it is exported into ``scratch`` first.

    Raises:
        TargetError: The program has no weights.
        OptionError: They are not in memory, and onnxruntime is to run them.
    """
    if not program.has_data:
        raise TargetError("the model has no weights, so there is nothing to measure", hint="leave out meta=true")
    if backend != "onnx":
        return Predictor.of(program), "torch"
    if program.source is not None:
        raise OptionError("an ONNX file needs the weights in memory", where="--backend", hint="leave out lazy=true, or ask torch")
    from irprune.backend.onnx import export

    with doing("export"):
        file = export(program, scratch / "model.onnx")
    return Predictor.onnx(file.path), "onnx"


def of_run(folder: Path, backend: str) -> tuple[Predictor, str]:
    """What a run directory holds as a predictor: ``model.pt2`` in torch or ``model.onnx`` in onnxruntime.

    Raises:
        DataError: The run did not write that file.
    """
    manifest.Manifest.read(folder)
    if backend == "auto":
        backend = "torch" if (folder / "model.pt2").is_file() else "onnx"
    with doing(f"load in {backend}"):
        return (
            (Predictor.archive(folder / "model.pt2"), backend) if backend == "torch" else (Predictor.onnx(folder / "model.onnx"), backend)
        )


def tokenizer_of(target: str, given: str | None, **options: Any) -> Any:
    """The tokenizer of a target, or the one that is given.

    Args:
        target: ``hf:PATH_OR_ID``, a run directory or an ONNX file in one (the run's target then), or anything else.
        given: A directory, a hub id, or ``None``.
        options: ``revision`` and ``trust_remote_code`` of ``hf:`` targets.

    Raises:
        OptionError: The target names none, and none is given.
        TargetError: It cannot be loaded.
    """
    from irprune.frontend.hf_checkpoint import Checkpoint, tokenizer_at

    run = run_of(target)
    if given is None and run is not None:
        target = manifest.Manifest.read(run).target
    code = bool(options.get("trust_remote_code"))
    with quiet_transformers():
        if given is not None:
            found, reason = tokenizer_at(given.removeprefix("hf:"), code)
        elif target.startswith("hf:"):
            found, reason = Checkpoint.find(target, options.get("revision"), code).tokenizer()
        else:
            raise OptionError("the target has no tokenizer of its own", hint="name the directory of one with --tokenizer")
    if found is None:
        raise TargetError(f"there is no tokenizer: {reason}", where=given or target, hint="name the directory of one with --tokenizer")
    return found


def run_of(target: str) -> Path | None:
    """The run directory that a target is, or that the ONNX file lies in; ``None`` for any other target."""
    folder = Path(target)
    if folder.suffix == ".onnx" and (folder.parent / manifest.NAME).is_file():
        return folder.parent
    return folder if not target.startswith("hf:") and folder.is_dir() else None


def as_trimmed(tokenizer: Any, target: str) -> Any:
    """A tokenizer that gives the ids of a run whose vocabulary was cut; the same one for any other target.

    A tokenizer of just as many tokens as were kept was made for them, and gives their ids itself.

    Raises:
        DataError: The run does not say which tokens were kept.
    """
    run = run_of(target)
    kept = kept_ids(run) if run is not None else None
    return tokenizer if kept is None or len(tokenizer) == len(kept) else Renumbered(tokenizer, kept)


def named_texts(given: Sequence[str]) -> dict[str, Path]:
    """Texts by name, from ``FILE`` or ``NAME=FILE``; the name of a file is that without its ending."""
    out: dict[str, Path] = {}
    for entry in given:
        name, sign, path = entry.partition("=")
        file = Path(path if sign else entry)
        name = name if sign else file.stem
        if name in out:
            raise OptionError(f"two texts are named '{name}'", where="--text", hint="give each a name, as NAME=FILE")
        out[name] = file
    return out


def read(folder: Path) -> dict[str, Any] | None:
    """What ``evaluation.json`` in a directory says; ``None`` where it is not there.

    Raises:
        DataError: The file is not one that was written here.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(data["texts"], dict)
        assert isinstance(data["tasks"], dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise DataError("the file is no evaluation", where=str(path), hint="write it again with `irprune eval RUN --save`") from error
    return data
