"""The text form of a program: one line per operation, with dimension names instead of bare numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from irprune.ir.dims import Indexed, Term, Var, as_size, atom_size, resolve, variables
from irprune.ir.facts import Groups
from irprune.ir.program import Axes, Program
from irprune.rules.registry import op_name

DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b1",
}


def names(program: Program, groups: Groups | None = None) -> dict[Var, str]:
    """Readable variable names: a group's name, else ``d0``, ``d1`` … in order of appearance.

    Frozen variables have no name; they print as their size.
    """
    out: dict[Var, str] = {group.var: group.name for group in groups or () if group.prunable}
    count = 0
    for node in program.nodes:
        for axes in _each(program.typing.axes.get(node.name)):
            for term in axes:
                for var in variables(resolve(term)):
                    if var.frozen is None and var not in out:
                        out[var] = f"d{count}"
                        count += 1
    return out


def _each(axes: Axes | list[Axes | None] | None) -> list[Axes]:
    if isinstance(axes, list):
        return [item for item in axes if item is not None]
    return [] if axes is None else [axes]


def term_text(term: Term, names: Mapping[Var, str], symbols: Mapping[str, str] | None = None) -> str:
    """``kv0:4*rep0:2*8``: factors by ``*``, blocks by ``|``, equal neighbouring blocks as ``2*block``."""
    parts = []
    for atom in resolve(term):
        if isinstance(atom, Var):
            size = _symbolic(atom.size, symbols)
            parts.append(f"{names[atom]}:{size}" if atom in names else size)
            continue
        if isinstance(atom, Indexed):
            parts.append(f"{names.get(atom.var, atom.var.size)}[{_positions(atom.positions)}]")
            continue
        if len(set(atom.blocks)) == 1 and atom.blocks[0]:
            inner = term_text(atom.blocks[0], names, symbols)
            parts.append(f"{len(atom.blocks)}*{inner}")
        elif not any(variables((atom,))):
            parts.append(_symbolic(atom_size(atom), symbols))
        else:
            parts.append("(" + "|".join(term_text(block, names, symbols) for block in atom.blocks) + ")")
    return "*".join(parts) or "1"


def _positions(positions: tuple[int, ...]) -> str:
    """``7..0``, ``0,3,1,2``: runs by their ends, long lists by how they begin."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and abs(position - runs[-1][-1]) == 1 and (len(runs[-1]) == 1 or position - runs[-1][-1] == runs[-1][-1] - runs[-1][-2]):
            runs[-1].append(position)
        else:
            runs.append([position])
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return ",".join(texts if len(texts) <= 8 else [*texts[:6], "…"])


def _symbolic(size: Any, symbols: Mapping[str, str] | None) -> str:
    text = str(size)
    for symbol, label in (symbols or {}).items():
        text = text.replace(symbol, label)
    return text


def _symbols(program: Program) -> dict[str, str]:
    """Symbol to the label that the interface gives the axis."""
    out: dict[str, str] = {}
    placeholders = [node for node in program.nodes if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)]
    for node, dynamic in zip(placeholders, program.interface.dynamic, strict=False):
        for axis, label in dynamic.items():
            size = as_size(node.meta["val"].shape[axis])
            if not isinstance(size, int):
                out[str(size)] = label
    return out


def type_text(node: fx.Node, program: Program, named: Mapping[Var, str], symbols: Mapping[str, str]) -> str:
    """``f32[b, s, ffn0:96]`` of one node; several results in parentheses."""
    axes = program.typing.axes.get(node.name)
    value = node.meta.get("val")
    values = list(value) if isinstance(value, tuple | list) else [value]
    listed = axes if isinstance(axes, list) else [axes]
    texts = []
    for item, tensor in zip(listed, values, strict=False):
        if item is None:
            continue
        dtype = DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")) if isinstance(tensor, torch.Tensor) else "?"
        texts.append(f"{dtype}[{', '.join(term_text(term, named, symbols) for term in item)}]")
    return texts[0] if len(texts) == 1 and not isinstance(axes, list) else f"({', '.join(texts)})"


def dump(program: Program, groups: Groups | None = None) -> str:
    """The program as text. It depends on the program only: no addresses, no times, no paths."""
    named = names(program, groups)
    symbols = _symbols(program)
    lines = []
    for node in program.nodes:
        if node.op == "output":
            lines.append(f"return {_argument(node.args[0])}")
            continue
        typed = f" : {type_text(node, program, named, symbols)}" if node.name in program.typing.axes else ""
        if node.op == "placeholder":
            lines.append(f"input %{node.name}{typed}")
        elif node.op == "get_attr":
            kind = "param" if program.is_parameter(str(node.target)) else "buffer"
            lines.append(f"{kind} @{node.target}{typed}")
        else:
            arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in sorted(node.kwargs.items())]
            lines.append(f"%{node.name} = {op_name(node.target).removeprefix('aten::')}({', '.join(arguments)}){typed}")
    if groups is not None:
        lines.append("")
        lines.extend(group_text(group) for group in groups)
    return "\n".join(lines)


def group_text(group: Any) -> str:
    """One line: name, size, kind, exactness, writers, carriers, readers, reason if frozen."""
    by_role = {role: [str(m) for m in group.members if m.role == role] for role in ("write", "carry", "read")}
    words = {"write": "writes", "carry": "carries", "read": "reads"}
    parts = [f"{group.name}:{group.size}", group.kind, "exact" if group.exact else "mixed"]
    parts += [f"{words[role]} {' '.join(found)}" for role, found in by_role.items() if found]
    if group.frozen is not None:
        parts.append(f"frozen [{group.frozen.code}] {group.frozen.message}")
    return "  ".join(parts)


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"@{value.target}" if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_argument(v)}" for k, v in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).removeprefix("torch.")
