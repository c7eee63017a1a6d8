"""The pass ``lora``."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import fx

from irprune.analysis.plan import modules_of
from irprune.errors import OptionError, PipelineError
from irprune.ir.edit import Editor
from irprune.ir.facts import Fact, Task
from irprune.ir.program import Program
from irprune.pipeline.passes import Facts, Pass, Result
from irprune.pipeline.registry import suggestion
from irprune_passes.given import refuse_void
from irprune_passes.lora import peft
from irprune_passes.lora.adapters import Site, adapters, attach, home, scaling, sites

Kind = Literal["linear", "conv", "embedding"]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


class Lora(Pass):
    """Attach low-rank adapters: what ``recover`` trains and ``merge`` folds into the weights.

    Before::  %y = linear(%x, @up.weight)
    After::   %y = linear(%x, @up.weight)
              %a = linear(%x, @up.lora_A.weight)
              %b = linear(%a, @up.lora_B.weight)
              %s = mul(%b, 2)
              %t = add(%y, %s)

    A starts random and B at zero (an embedding's the other way round), so the program computes what it
    computed before. Adapters are ordinary operations: an adapted program is typed, pruned and exported
    like any other, and the rank is the one axis of it that stays whole.

    A weight that operations of several kinds read (an embedding tied to the head) takes no adapter:
    merging would change all of its readers. Without ``targets`` all others of the chosen ``kinds`` get
    one, but for those that write the model's output directly.

    Raises:
        OptionError: A target fits nothing, or a weight that takes no adapter.
        DataError: The adapter to load does not fit the program.
    """

    name: ClassVar[str] = "lora"
    uses: ClassVar[tuple[type[Fact], ...]] = (Task,)
    changes: ClassVar[bool] = True

    r: int = Field(8, ge=1, description="Rank; of each group for a grouped convolution.")
    alpha: float = Field(16.0, gt=0, allow_inf_nan=False, description="The adapter's output is multiplied by alpha / r.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Part of an adapter's input that is dropped in training; not for embeddings.")
    targets: Names = Field((), description="Weights or modules, as patterns: `*.q_proj`, `*.mlp`. Empty: all of the chosen kinds.")
    kinds: Annotated[tuple[Kind, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)] = Field(
        ("linear", "conv"), description="What gets adapters where no target is given. Not by default: embedding."
    )
    rslora: bool = Field(False, description="Multiply by alpha / sqrt(r) instead (rank-stabilised).")
    init: Literal["kaiming", "gaussian"] = Field(
        "kaiming", description="How the random factor starts: kaiming uniform, or normal with deviation 1 / r."
    )
    load: Path | None = Field(None, description="A directory in PEFT's format: its adapters, with its rank and scale, instead of new ones.")
    seed: int | None = Field(None, ge=0, description="Seed of the random factors; none: that of the run.")

    @model_validator(mode="after")
    def _check_together(self) -> Lora:
        if self.load is not None:
            reason = "`load`, which brings its own"
            refuse_void(self, {name: reason for name in type(self).model_fields if name != "load"})
        refuse_void(self, {"kinds": "`targets`, which says what gets adapters" if self.targets else None})
        return self

    def run(self, program: Program, facts: Facts) -> Result:
        if adapters(program):
            raise PipelineError("the program has adapters already", where="pass lora", hint="put `merge` before the second `lora`")
        task = facts.get(Task)
        seed = self.seed if self.seed is not None else task.seed if task is not None else 0
        edit = Editor(program)
        if self.load is not None:
            for loaded in peft.read(self.load, program):
                attach(edit, loaded.site, loaded.a, loaded.b, scale=loaded.scale, dropout=loaded.dropout)
            return Result(edit.done())
        generator = torch.Generator().manual_seed(seed)
        scale = scaling(self.alpha, self.r, stabilised=self.rslora)
        for site in self._chosen(program):
            weight = program.tensors[site.weight]
            a, b = self._start(site, weight, home(program, weight), generator)
            attach(edit, site, a, b, scale=scale, dropout=self.dropout)
        return Result(edit.done())

    def _start(
        self, site: Site, weight: torch.Tensor, device: torch.device, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B as they start: one of them random, the other zero."""
        shapes = site.shapes(weight, self.r)
        which = 1 if site.kind == "embedding" else 0
        drawn = torch.empty(shapes[which])
        if which == 1:
            drawn.normal_(generator=generator)
        elif self.init == "gaussian":
            drawn.normal_(std=1 / self.r, generator=generator)
        else:
            torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        values = [torch.zeros(shape, dtype=weight.dtype, device=device) for shape in shapes]
        values[which] = drawn.to(values[which])
        return values[0], values[1]

    # -- which ------------------------------------------------------------------------------------

    def _chosen(self, program: Program) -> list[Site]:
        known = sites(program)
        if not self.targets:
            heads = set(_heads(program, known))
            chosen = [site for name, site in known.items() if site.kind in self.kinds and name not in heads]
            if not chosen:
                raise OptionError(
                    f"the program has no weight of kind {' or '.join(self.kinds)} that takes an adapter",
                    where="pass lora",
                    hint="name weights in `targets`; the head gets an adapter only if it is named",
                )
            return chosen
        wanted: dict[str, Site] = {}
        for pattern in self.targets:
            fits = [name for name in program.tensors if program.is_parameter(name) and _fits(program, name, pattern)]
            able = [name for name in fits if name in known]
            if not able:
                raise _refused(program, pattern, fits)
            wanted.update((name, known[name]) for name in able)
        return [site for name, site in known.items() if name in wanted]


def _fits(program: Program, name: str, pattern: str) -> bool:
    """A pattern fits a weight, a module around it, or another name of a tied weight."""
    names = [name, *(other for other, used in program.aliases.items() if used == name)]
    return bool(fnmatch.filter(modules_of(names), pattern))


def _refused(program: Program, pattern: str, fits: Sequence[str]) -> OptionError:
    if not fits:
        near = suggestion(pattern, modules_of(program.tensors)).partition("known:")[0]
        return OptionError(f"target '{pattern}' fits no weight and no module of the program; {near}".rstrip("; "), where="pass lora")
    name = fits[0]
    readers = sorted({str(user.target).removeprefix("aten.").partition(".")[0] for user in program.holders[name].users})
    return OptionError(
        f"target '{pattern}' fits no weight that takes an adapter: {name} is read by {', '.join(readers)}",
        where="pass lora",
        hint="name linear layers, convolutions or embeddings whose weights nothing else reads",
    )


def _heads(program: Program, known: dict[str, Site]) -> Iterator[str]:
    """Weights whose results reach an output of the model with no other parameter on the way."""
    for name, site in known.items():
        pending: list[fx.Node] = [program.by_name[base] for base in site.bases]
        seen: set[fx.Node] = set()
        while pending:
            node = pending.pop()
            if node.op == "output":
                yield name
                break
            for user in node.users:
                if user not in seen and not any(_is_parameter(program, operand) for operand in user.all_input_nodes):
                    seen.add(user)
                    pending.append(user)


def _is_parameter(program: Program, node: Any) -> bool:
    return node.op == "get_attr" and program.is_parameter(str(node.target))
