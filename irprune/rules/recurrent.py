"""Recurrent cells and layers: hidden units are one variable per call."""

from __future__ import annotations

from typing import Any

from irprune.ir.dims import UNIT, Term
from irprune.ir.program import Axes
from irprune.rules.infer import Op, Value, sizes
from irprune.rules.registry import rule

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def _cell(op: Op, gates: int, x: Term, hidden: Term, weights: list[Value]) -> None:
    """Tie one layer in one direction.

    Shapes: w_ih ``(gates * H, in)``, w_hh ``(gates * H, H)``, biases ``(gates * H,)``. A unit's gates
    go with the unit; its columns in w_hh are contracted.
    """
    rows = (*op.solid(gates, "position", "its positions are the gates of a recurrent cell"), *hidden)
    w_ih, w_hh, *biases = weights
    op.unify(w_ih.axes[1], x)
    op.unify(w_ih.axes[0], rows)
    op.unify(w_hh.axes[0], rows)
    op.unify(w_hh.axes[1], hidden)
    for bias in biases:
        op.unify(bias.axes[0], rows)
    op.contract(w_ih, 1)
    op.contract(w_hh, 1)


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(
    op: Op,
    input: Value | None = None,
    hx: Any = None,
    params: list[Value] | None = None,
    has_biases: bool = True,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> Any:
    """Stacked recurrent layers.

    Shapes: x ``(T, B, in)`` (or batch first), states ``(layers * directions, B, H)``, output
    ``(T, B, directions * H)``. All layers and directions share ``H``, as their states are stacked.
    Packed sequences and projections (LSTMP) stay whole.
    """
    gates = GATES[op.name]
    directions = 2 if bidirectional else 1
    per = 4 if has_biases else 2
    states = hx if isinstance(hx, list) else [hx]
    if input is None or params is None or len(params) != per * num_layers * directions:
        return _whole(op)
    hidden = states[0].axes[-1]
    batch = 0 if batch_first else 1
    for state in states:
        op.unify(state.axes[-1], hidden)
        op.freeze(state.axes[0], "position", "its positions are layers and directions")
        if input.ndim == 3:
            op.unify(state.axes[1], input.axes[batch])
    both = (*op.solid(directions, "position", "its positions are the directions of a recurrent layer"), *hidden)
    x = input.axes[-1]
    op.contract(input, -1)
    for layer in range(num_layers):
        for direction in range(directions):
            first = per * (layer * directions + direction)
            _cell(op, gates, x, hidden, params[first : first + per])
        x = both
    op.freeze(input.axes[1 - batch if input.ndim == 3 else 0], "position", "a recurrent layer walks along it")
    outer = tuple(atom for term in input.axes[:-1] for atom in term)
    op.macs(*((*outer, *(atom for term in weight.axes for atom in term)) for i, weight in enumerate(params) if i % per < 2))
    outputs: list[Axes] = [(*input.axes[:-1], both)]
    return outputs + [state.axes for state in states]


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(op: Op, input: Value, hx: Any, w_ih: Value, w_hh: Value, b_ih: Value | None = None, b_hh: Value | None = None) -> Any:
    """One step. Shapes: x ``(B, in)``, states ``(B, H)``."""
    states = hx if isinstance(hx, list) else [hx]
    hidden = states[0].axes[-1]
    for state in states:
        op.unify(state.axes[-1], hidden)
        op.contract(state, -1)
    op.contract(input, -1)
    name = op.name.removesuffix("_cell")
    _cell(op, GATES[name], input.axes[-1], hidden, [value for value in (w_ih, w_hh, b_ih, b_hh) if value is not None])
    rows = input.axes[:-1]
    op.macs(*(tuple(atom for term in (*rows, *weight.axes) for atom in term) for weight in (w_ih, w_hh)))
    result = (*rows, hidden or UNIT)
    return [result] * len(op.results) if len(op.results) > 1 else result


def _whole(op: Op) -> Any:
    for value in op.operands():
        for term in value.axes:
            op.freeze(term, "recurrent", "a recurrent layer of a form that is not understood reads it")
    found = [tuple(op.solid(s, "recurrent", "a recurrent layer gives it") for s in sizes(r)) for r in op.results]
    return found if len(found) > 1 else found[0]
