"""Hugging Face models at sizes of their own: what they were traced from, and how they are loaded again."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from irprune.backend import hf_resize
from irprune.backend.hf_resize import Resizing
from irprune.errors import IrpruneError, TargetError
from irprune.frontend import blame
from irprune.frontend.hf_checkpoint import Checkpoint
from irprune.ir.facts import Pretrained
from irprune.ir.program import Program
from irprune.quiet import quiet_transformers

# Beside weights and configuration: what sentence-transformers reads, by name, in a directory.
_SENTENCE = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "*_Pooling/config.json",
    "*_Normalize/*.json",
)


def load_pretrained(path: str | os.PathLike[str], *, verify: bool = True, trust_remote_code: bool = False, **options: Any) -> Any:
    """Load a Hugging Face checkpoint that a run wrote, whichever its layout.

    Args:
        path: The directory (``hf`` in the run directory), or what ``save_pretrained`` made of such a model.
        verify: Check the weights' checksums, and compare with the reference outputs in the directory.
        trust_remote_code: Run the modelling code that comes with the checkpoint.
        options: Those of ``from_pretrained`` (``dtype``, ``device_map``, ``attn_implementation`` …).

    Returns:
        The class of transformers that the configuration names, at the sizes of the checkpoint, in evaluation
        mode. ``generate``, ``Trainer`` and PEFT work as with any model of this class.

    Raises:
        TargetError: There is no such checkpoint, or it cannot be read.
        DataError: A file is cut off, or not the one that the run wrote; or the sizes are for another model.
        ParityError: The model does not give the reference outputs.
    """
    folder = Path(path)
    checkpoint = Checkpoint.find(str(folder), code=trust_remote_code)
    model_class, _ = checkpoint.model_class()
    if trust_remote_code:
        options["trust_remote_code"] = True
    try:
        with quiet_transformers():
            return hf_resize.load(folder, model_class, verify=verify, **options)
    except IrpruneError:
        raise
    except Exception as error:
        raise TargetError(
            f"transformers cannot load it: {blame.first_line(error)}", where=str(folder), hint="name a directory that a run wrote"
        ) from error


def pretrained(model: Any, checkpoint: Checkpoint | None = None, retrace: Callable[[Any], Program] | None = None) -> Pretrained:
    """A model of transformers as the source of a program.

    Args:
        model: The model.
        checkpoint: Where it was loaded from; without one nothing but generation settings lies beside its weights.
        retrace: Traces a model of the same class, without weights, as the original was traced.
    """
    config = checkpoint.original if checkpoint is not None else model.config
    config = copy.deepcopy(config)
    if Resizing.of(model.config) is not None:
        setattr(config, hf_resize.KEY, getattr(model.config, hf_resize.KEY))
    return Pretrained(model, config, _companions(model, checkpoint), retrace)


def _companions(model: Any, checkpoint: Checkpoint | None) -> Callable[[Path], list[str]]:
    settings = copy.deepcopy(getattr(model, "generation_config", None))

    def write(folder: Path) -> list[str]:
        notes = []
        if settings is not None and model.can_generate():
            try:
                settings.save_pretrained(str(folder))
            except ValueError as error:
                notes.append(f"the generation settings of the checkpoint are not valid and were left out: {blame.first_line(error)}")
        if checkpoint is None:
            return notes
        with quiet_transformers():
            for one in checkpoint.processors():
                one.save_pretrained(str(folder))
        home = Path(checkpoint.location)
        for pattern in _SENTENCE if home.is_dir() else ():
            for file in home.glob(pattern):
                place = folder / file.relative_to(home)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
        return notes

    return write


def is_pretrained(module: torch.nn.Module) -> bool:
    """Whether a module is a model of transformers. It is not imported for the answer."""
    return any(kind.__module__ == "transformers.modeling_utils" and kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__)
