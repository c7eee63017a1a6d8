"""Hugging Face models: task, inputs, calibration, loss and metric are derived from the checkpoint.

Nothing here knows a model family. The class comes from ``config.architectures``, its task from
transformers' own auto-class tables, its inputs from ``main_input_name`` and the signature of
``forward``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from irprune.backend.hf_stream import buffers_on_meta, of_model
from irprune.errors import DataError, TargetError, TraceError
from irprune.frontend import text, unloaded
from irprune.frontend.batches import Binding, counted, read
from irprune.frontend.export import trace
from irprune.frontend.hf_checkpoint import Checkpoint, Loading, without_cache
from irprune.frontend.hf_inputs import Reader
from irprune.frontend.hf_pretrained import pretrained
from irprune.frontend.objectives import Batch, Kind, Objective
from irprune.ir.facts import Fact, Task
from irprune.ir.program import Program
from irprune.quiet import quiet_transformers

_OUTPUTS = ("logits", "start_logits,end_logits", "logits_per_image", "last_hidden_state", "pooler_output")


class Options(BaseModel):
    """What can be set for an ``hf:`` target."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32", description="Type of the weights; auto is the checkpoint's own."
    )
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="Attention to trace; eager where the class refuses sdpa.")
    sequence: int = Field(64, ge=4, description="Tokens in each window of text.")
    batch: int = Field(2, ge=2, description="Samples in a batch; a trace takes a batch of 1 for a constant.")
    windows: int = Field(16, ge=1, description="Calibration windows at most; the metric takes up to four times as many.")
    outputs: str | None = Field(
        None,
        description="Names of the outputs to keep, comma-separated; the default is the first that the model has of "
        + "; ".join(_OUTPUTS)
        + ".",
    )
    meta: bool = Field(False, description="Build the model on the meta device from its configuration alone: no weights, no data.")
    lazy: bool = Field(
        False,
        description="Leave the weights in the checkpoint's safetensors files and read each when it is needed, for checkpoints larger "
        "than memory.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub repository.")
    trust_remote_code: bool = Field(False, description="Run the modelling code that comes with the checkpoint.")


_DEFAULTS = Options.model_validate({})


def load(target: str, *, calibration: str | None = None, seed: int = 0, options: Options = _DEFAULTS) -> tuple[Program, tuple[Fact, ...]]:
    """Trace a Hugging Face model.

    Calibration text is the one given, else a short one shipped with irprune; its last fifth is held
    out for the metric. Models that read no text are calibrated with normal noise unless data is
    given. Losses and metrics: :mod:`irprune.frontend.objectives`. Batches are dicts by input name.

    Args:
        target: ``hf:`` and a directory with ``config.json``, a ``.gguf`` file in a directory or
            repository, or a hub id. Local files are preferred to the hub.
        calibration: ``.txt``; ``.jsonl`` with a ``text``, or a ``prompt`` and a ``response`` (the prompt does
            not count in the loss), in each line; or samples by input name
            (``.safetensors``, ``.npz``, ``.jsonl``).
        seed: Seed of inputs that are no text, and of weights that the checkpoint lacks.
        options: What can be set.

    Returns:
        The untyped program, with weights under the model's own names, the :class:`Task` and the
        :class:`Pretrained` model.

    Raises:
        TargetError: There is no such checkpoint, it cannot be read, or its inputs cannot be derived.
        TraceError: The model cannot be traced.
        DataError: Weights or calibration data cannot be used.
    """
    with quiet_transformers():
        checkpoint = Checkpoint.find(target, options.revision, options.trust_remote_code)
        how: Loading = "meta" if options.meta else "lazy" if options.lazy else "whole"
        model, kind, notes = checkpoint.build(dtype=options.dtype, attention=options.attention, how=how, seed=seed)
        reader = Reader(model, kind, _length(checkpoint.config, options.sequence), checkpoint.preprocessor())
        tokenizer, reason = checkpoint.tokenizer() if reader.reads_text and not options.meta else (None, None)
    if reason is not None:
        notes.append(f"there is no tokenizer, so no calibration text: {reason}")
    rows, file = None, calibration
    instructions = text.pairs(Path(calibration)) if calibration is not None else None
    if tokenizer is not None:
        given = None if instructions else text.read(Path(calibration)) if calibration is not None else text.shipped()
        if given is not None:
            rows, file = text.windows(tokenizer, given, reader.length, framed=reader.framed), None
    if rows is None and file is None and not reader.reads_text and not options.meta:
        notes.append("calibration inputs are noise; give real ones with --calibration FILE")
    with quiet_transformers():
        retrace = functools.partial(_lazily, batch=options.batch, seed=seed, rows=rows, outputs=options.outputs)
        if how == "lazy":
            program = retrace(reader)
            program = dataclasses.replace(program, source=of_model(model, checkpoint.folder(), program))
            unsure = unloaded.check(model, program)
            notes += [unsure] if unsure is not None else []
        else:
            program = _traced(reader, options.batch, seed, rows, options.outputs)
    program = _noted(program, [*notes, *_unused(model, program)])
    task = Task(target=target, inputs=Binding([], program.interface), seed=seed, tokenizer=tokenizer)
    source = pretrained(model, checkpoint, retrace=lambda other: retrace(dataclasses.replace(reader, model=other)))
    files = _Files(reader, program, tokenizer, options, seed)
    if options.meta or (instructions is None and file is None and rows is None and reader.reads_text):
        return program, (task, source)
    if file is not None:
        data = _parted(files.batches(Path(file)))
        program = _noted(program, files.notes)
    else:
        data = _derived(reader, program, rows, options, seed)
    names = tuple(program.interface.example[1])
    return program, (_with_data(task, _objective(kind, program, tokenizer), *data, names, files), source)


def _lazily(reader: Reader, batch: int, seed: int, rows: torch.Tensor | None, outputs: str | None) -> Program:
    """A program traced from a model without weights; its example inputs have their data."""
    without_cache(reader.config)
    with buffers_on_meta(reader.model):
        program = _traced(reader, batch, seed, rows, outputs)
    names = tuple(program.interface.example[1])
    example = reader.batch(names, batch, torch.Generator().manual_seed(seed), None if rows is None else rows[:batch])
    interface = dataclasses.replace(program.interface, example=((), {name: example[name] for name in names}))
    return dataclasses.replace(program, interface=interface)


def _objective(kind: Kind, program: Program, tokenizer: Any | None) -> Objective:
    """A classifier shows in its outputs; a masked model whose mask is not known is measured like one."""
    mask = getattr(tokenizer, "mask_token_id", None)
    if (kind == "encoder" and "logits" in program.interface.outputs[0]) or (kind == "masked-lm" and mask is None):
        kind = "classifier"
    return Objective(kind, program, mask, tuple(getattr(tokenizer, "all_special_ids", ())))


@dataclasses.dataclass(frozen=True)
class _Files:
    """Reads batches from files: text, instructions, or samples by input name."""

    reader: Reader
    program: Program
    tokenizer: Any | None
    options: Options
    seed: int
    notes: list[str] = dataclasses.field(default_factory=list)

    def batches(self, path: Path) -> list[Batch]:
        """All of a file, in its order.

        Raises:
            DataError: The file is missing, not of these kinds, or does not fit the inputs.
        """
        instructions = text.pairs(path)
        if instructions is not None:
            return self._masked(path, instructions)
        content = text.read(path) if self.tokenizer is not None else None
        if content is None:
            return list(counted(read(path, Binding([], self.program.interface)), str(path)))
        rows = text.windows(self.tokenizer, content, self.reader.length, framed=self.reader.framed)
        return _cut(self.reader, self.program, rows, self.options.batch, torch.Generator().manual_seed(self.seed + 1))

    def _masked(self, path: Path, instructions: list[tuple[str, str]]) -> list[Batch]:
        """Samples of like length share a batch, so that little is filled up."""
        if self.reader.kind != "causal-lm" or self.tokenizer is None:
            raise DataError("prompts and responses need a causal language model with a tokenizer", where=str(path), hint="give plain text")
        rows = sorted(text.masked(self.tokenizer, instructions, self.reader.length), key=lambda row: len(row[0]))
        if not rows:
            hint = "raise it with --set sequence"
            raise DataError(f"no response begins within sequence={self.reader.length} tokens", where=str(path), hint=hint)
        if len(rows) < len(instructions):
            left = len(instructions) - len(rows)
            why = f"their prompts fill sequence={self.reader.length} tokens; raise it with --set sequence"
            self.notes.append(f"{left} of {len(instructions)} samples of {path.name} are left out: {why}")
        filler = next((token for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if token is not None), 0)
        dynamic = self.program.interface.dynamic[0]
        size, width = self.options.batch, None if 1 in dynamic else self.reader.length
        pieces = [rows[start : start + size] for start in range(0, len(rows), size)]
        made = [text.padded(piece, filler, width) for piece in pieces if len(piece) == size or 0 in dynamic]
        order = torch.randperm(len(made), generator=torch.Generator().manual_seed(self.seed))
        return [made[index] for index in order.tolist()]


def _with_data(
    task: Task, objective: Objective, calibrate: list[Batch], held_out: list[Batch], names: tuple[str, ...], files: _Files
) -> Task:
    def prepared(raw: list[Batch]) -> Iterator[Batch]:
        return map(objective.prepared, raw)

    def evaluate(predict: Callable[..., Any]) -> dict[str, float]:
        return objective.evaluate(predict, prepared(held_out), names)

    def other(path: Path) -> Callable[[], Iterator[Batch]]:
        raw = files.batches(path)
        return lambda: prepared(raw)

    return dataclasses.replace(
        task,
        calibration=lambda: prepared(calibrate),
        loss=objective.loss,
        evaluate=evaluate,
        positions=objective.positions,
        read=other,
        said=files.notes,
    )


def _parted(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """The last fifth of a file's batches is held out for the metric; a single batch serves for both."""
    cut = len(batches) - max(1, len(batches) // 5)
    return (batches[:cut], batches[cut:]) if cut else (batches, batches)


def _length(config: Any, sequence: int) -> int:
    """Tokens in a row: as asked, within the positions that the model has."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    # Some models keep the first two positions of their table for themselves.
    return min(sequence, positions - 2) if isinstance(positions, int) and positions > 2 else sequence


def _traced(reader: Reader, batch: int, seed: int, rows: torch.Tensor | None, outputs: str | None) -> Program:
    """Trace with the fewest inputs and the most dynamic axes that work."""
    choices = list(reader.choices())
    for number, names in enumerate(choices):
        generator = torch.Generator().manual_seed(seed)
        example = reader.batch(names, batch, generator, None if rows is None else rows[:batch])
        full = reader.dynamic(names)
        fewer: list[dict[str, dict[int, str]]] = [full, {name: {0: label[0]} for name, label in full.items()}, {name: {} for name in names}]
        for dynamic in fewer:
            try:
                return trace(reader.model, (), example, dynamic, outputs=lambda given: _kept(given, outputs), strict=False)
            except TargetError:
                if number == len(choices) - 1:
                    raise
                break
            except TraceError:
                if dynamic is fewer[-1]:
                    raise
    raise AssertionError("there is always a choice of inputs")


def _kept(given: tuple[str, ...], outputs: str | None) -> tuple[str, ...]:
    if outputs is not None:
        return _split(outputs)
    return next((names for names in map(_split, _OUTPUTS) if set(names) <= set(given)), given[:1])


def _split(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(","))


def _derived(reader: Reader, program: Program, rows: torch.Tensor | None, options: Options, seed: int) -> tuple[list[Batch], list[Batch]]:
    """Batches to calibrate with and batches to measure with, from rows of text or from noise."""
    names = tuple(program.interface.example[1])
    generator = torch.Generator().manual_seed(seed + 1)
    if rows is None:
        count = -(-options.windows // options.batch)
        noise = [reader.batch(names, options.batch, generator) for _ in range(2 * count)]
        return noise[:count], noise[count:]
    calibrate, held_out = text.parted(rows)
    return tuple(  # type: ignore[return-value]
        _cut(reader, program, part, options.batch, generator) for part in (calibrate[: options.windows], held_out[: 4 * options.windows])
    )


def _cut(reader: Reader, program: Program, rows: torch.Tensor, size: int, generator: torch.Generator) -> list[Batch]:
    """Rows of text as batches; the last one may be smaller where the program allows it."""
    names = tuple(program.interface.example[1])
    whole_only = 0 not in program.interface.dynamic[0]
    pieces = [piece for piece in rows.split(size) if len(piece) == size or not whole_only]
    return [reader.batch(names, len(piece), generator, piece) for piece in pieces]


def _unused(model: torch.nn.Module, program: Program) -> list[str]:
    names = [name for name, _ in model.named_parameters() if name not in program.tensors]
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"not needed for {', '.join(program.interface.outputs)} and left out: {names[0]}{more}"]


def _noted(program: Program, notes: list[str]) -> Program:
    interface = dataclasses.replace(program.interface, notes=(*program.interface.notes, *notes))
    return dataclasses.replace(program, interface=interface)
