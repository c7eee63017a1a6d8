"""Recipes: the keep masks of a pruning, in a few kilobytes that replay it on the same checkpoint.

A recipe is a safetensors file. It has one tensor per group, named by the group's key: the mask, eight
indices to a byte. Under ``irprune`` its metadata hold JSON: what the masks belong to (names and shapes
of the original tensors) and where they come from.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from irprune.errors import RecipeError
from irprune.ir.dims import Mask, Var
from irprune.ir.facts import Groups, PruneReport
from irprune.ir.program import Program
from irprune.pipeline.files import atomic

METADATA = "irprune"


class Header(BaseModel):
    """The JSON part of a recipe file.

    Attributes:
        format: Version of this layout.
        irprune: Version of the writer.
        target: What was pruned, as the user named it.
        requested: The options that asked for it.
        sizes: Group key to the number of its indices.
        tensors: Name to shape of every tensor of the original program.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    irprune: str
    target: str
    requested: dict[str, Any]
    sizes: dict[str, int]
    tensors: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Recipe:
    """Keep masks over the indices of an original program.

    Attributes:
        keep: Group key to mask; True where an index stays.
        tensors: Name to shape of every tensor of the original program.
        target: What was pruned, as the user named it.
        requested: The options that asked for it.
        irprune: Version of the writer.
    """

    keep: Mapping[str, Mask]
    tensors: Mapping[str, tuple[int, ...]] = field(repr=False)
    target: str = ""
    requested: Mapping[str, Any] = field(default_factory=dict)
    irprune: str = field(default_factory=lambda: version("irprune"))

    @classmethod
    def of(cls, report: PruneReport, original: Program, target: str = "") -> Recipe:
        """What a pruning did, as a recipe for the program that it started from."""
        return cls(keep=report.keep, tensors=shapes(original), target=target, requested=report.requested)

    def masks(self, program: Program, groups: Groups) -> dict[Var, Mask]:
        """The masks by variable of a program.

        Args:
            program: A typed program with the structure that the recipe was made for.
            groups: Its groups.

        Raises:
            RecipeError: The program has another structure (the first tensor that differs is named), or
                a group of the recipe is not there or frozen in it.
        """
        self._check(shapes(program))
        by_key = {group.key: group for group in groups}
        out = {}
        for key, mask in self.keep.items():
            group = by_key.get(key)
            if group is None or group.size != len(mask):
                found = "has no such group" if group is None else f"has {group.size} of them"
                raise RecipeError(
                    f"the recipe keeps {int(mask.sum())} of {len(mask)} indices of group {key}; the program {found}",
                    hint=f"the recipe was written by irprune {self.irprune}: make it again with this version",
                )
            if group.frozen is not None and not mask.all():
                raise RecipeError(
                    f"the recipe removes indices of group {key} ({group.name}), which is frozen here: {group.frozen.message}",
                    hint="trace and discover with the options that the recipe was made with",
                )
            out[group.var] = mask
        return out

    def _check(self, found: Mapping[str, tuple[int, ...]]) -> None:
        for name in (*self.tensors, *found):
            wanted, got = self.tensors.get(name), found.get(name)
            if wanted != got:
                differs = (
                    f"is missing; the recipe wants it with shape {list(wanted or ())}"
                    if got is None
                    else f"has shape {list(got)}, "
                    + ("the recipe wants " + str(list(wanted)) if wanted else "which the recipe does not know")
                )
                origin = f"; it was made for {self.target}" if self.target else ""
                raise RecipeError(
                    f"the recipe is for another model: tensor {name} {differs}{origin}",
                    hint="apply it to the checkpoint that it was made from",
                )


def shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """The structure of a checkpoint: name to shape of each tensor that the program uses."""
    return {name: tuple(tensor.shape) for name, tensor in program.tensors.items()}


def save_recipe(path: str | Path, recipe: Recipe) -> None:
    """Write a recipe; the file appears only when whole.

    Raises:
        OutputError: The file cannot be written.
    """
    header = Header(
        irprune=recipe.irprune,
        target=recipe.target,
        requested=dict(recipe.requested),
        sizes={key: len(mask) for key, mask in recipe.keep.items()},
        tensors=dict(recipe.tensors),
    )
    packed = {key: np.packbits(mask) for key, mask in recipe.keep.items()}
    with atomic(path) as part:
        part.write_bytes(save(packed, metadata={METADATA: header.model_dump_json()}))


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        RecipeError: The file is not there, cut off, or not a recipe.
    """
    where = str(path)
    hint = "a run writes its recipe as recipe.safetensors in its directory"
    try:
        with safe_open(where, framework="numpy") as file:
            text = (file.metadata() or {}).get(METADATA)
            packed = {key: file.get_tensor(key) for key in file.keys()} if text is not None else {}  # noqa: SIM118
    except OSError as error:
        raise RecipeError(f"the recipe cannot be read: {error.strerror or 'no such file'}", where=where, hint=hint) from error
    except SafetensorError as error:
        raise RecipeError(f"the file is cut off or not a safetensors file: {error}", where=where, hint=hint) from error
    if text is None:
        raise RecipeError("the file holds tensors but no recipe", where=where, hint=hint)
    try:
        header = Header.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RecipeError(
            f"the recipe's description is damaged or of another version: {place}: {first['msg']}", where=where, hint=hint
        ) from error
    for key in itertools.chain(header.sizes.keys() ^ packed.keys()):
        raise RecipeError(f"the recipe is damaged: group {key} has no mask or no size", where=where, hint=hint)
    keep = {}
    for key, size in header.sizes.items():
        bits = packed[key]
        if bits.dtype != np.uint8 or bits.ndim != 1 or len(bits) != (size + 7) // 8:
            raise RecipeError(f"the recipe is damaged: the mask of group {key} does not have {size} bits", where=where, hint=hint)
        keep[key] = np.unpackbits(bits, count=size).astype(bool)
    return Recipe(keep=keep, tensors=header.tensors, target=header.target, requested=header.requested, irprune=header.irprune)
