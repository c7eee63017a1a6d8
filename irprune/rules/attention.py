"""Scaled dot product attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from irprune.ir.dims import UNIT, quotient
from irprune.ir.program import Axes
from irprune.rules.infer import Op, Value
from irprune.rules.registry import resize, rule

if TYPE_CHECKING:
    from irprune.backend.rewrite import Resize


@rule("scaled_dot_product_attention")
def attention(op: Op, query: Value, key: Value, value: Value, attn_mask: Value | None = None, enable_gqa: bool = False) -> Axes:
    """``softmax(q @ k.T * scale + mask) @ v``.

    Shapes: q ``(*, H, L, E)``, k ``(*, H_kv, S, E)``, v ``(*, H_kv, S, V)``, mask broadcast to
    ``(*, H, L, S)``. ``E`` is contracted, ``S`` normalised and summed. With ``enable_gqa``
    ``H = H_kv * R``, otherwise the leading axes are broadcast.
    Source: ``torch.nn.functional.scaled_dot_product_attention``.
    """
    op.unify(query.axes[-1], key.axes[-1])
    op.unify(key.axes[-2], value.axes[-2])
    op.contract(query, -1)
    op.contract(key, -1)
    op.freeze(key.axes[-2], "position", "attention is normalised over it")
    if enable_gqa and query.ndim > 2:
        heads = op.broadcast(key.axes[-3:-2], value.axes[-3:-2])[0]
        ratio = quotient(query.shape[-3], key.shape[-3])
        repeat = op.fresh(ratio if ratio is not None else 1)
        op.note("broadcast", repeat)
        op.unify(query.axes[-3], (*heads, *repeat))
        batch = (*op.broadcast(query.axes[:-3], key.axes[:-3], value.axes[:-3]), query.axes[-3])
    else:
        batch = op.broadcast(query.axes[:-2], key.axes[:-2], value.axes[:-2])
    if attn_mask is not None:
        op.broadcast((*batch, query.axes[-2], key.axes[-2]), attn_mask.axes)
    lead = tuple(atom for term in (*batch, query.axes[-2], key.axes[-2]) for atom in term)
    op.macs((*lead, *query.axes[-1]), (*lead, *value.axes[-1]))
    for position, term in enumerate(batch):
        op.note(f"batch{position}", term)
    op.note("head_dim", query.axes[-1])
    op.note("value_dim", value.axes[-1])
    return (*batch, query.axes[-2], value.axes[-1] or UNIT)


@resize("scaled_dot_product_attention")
def resize_attention(rw: Resize, scale: float | None = None, **_: Any) -> None:
    """The default scale depends silently on the head dimension: pin the original one."""
    size = rw.old_size("query", -1)
    if scale is None and isinstance(size, int):
        rw.set("scale", 1.0 / math.sqrt(size))


@rule("_native_multi_head_attention", "_transformer_encoder_layer_fwd")
def fused(op: Op, **_: Any) -> Any:
    """Fused inference kernels hide their head layout: everything stays whole."""
    for operand in op.operands():
        for term in operand.axes:
            op.freeze(term, "fused", "a fused attention kernel reads it")
    found = [
        tuple(op.solid(int(size), "fused", "a fused attention kernel gives it") for size in result.shape)
        if isinstance(result, torch.Tensor)
        else None
        for result in op.results
    ]
    return found if len(found) > 1 else found[0]
