"""Rules broken at random: the removal is refused, or nothing of it is wrong.

A break holds for every call of one operation, as a wrong rule would: a tie is left out or made with
another axis, a result's axes change places or lose what ties them, an event is not told, a size is not
computed anew. What passes the proof nevertheless (a break may tie more than is needed, or not matter
here) must hold on inputs that the proof has not seen.
"""

from __future__ import annotations

import collections
import functools
import itertools
import os
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from fuzz_networks import PLACES, Network, Step, Vector, _attention, _convolution, _experts, _norm, _position, _recurrent, _regroup
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from irprune.analysis.groups import discover
from irprune.backend.proof import Masked, Run, difference, prove
from irprune.backend.rewrite import remove
from irprune.errors import IrpruneError
from irprune.frontend.export import trace
from irprune.ir.dims import Mask, Var, index_maps, mask_of, resolve, variables
from irprune.ir.program import Program
from irprune.rules.infer import Op, typed
from irprune.rules.registry import op_name, registry

EXAMPLES = int(os.environ.get("IRPRUNE_FUZZ", "150"))
BREAKS = ("no tie", "another tie", "axes change places", "a result on its own", "no event", "no size")


@dataclass(frozen=True)
class Break:
    """One broken rule: which operation, in which way, at which of its calls or axes."""

    how: str
    name: str
    at: int
    other: int


def _network(width: int, *steps: tuple[Any, ...]) -> Network:
    """The steps of random networks with what they would draw given."""
    channels, made = width, []
    torch.manual_seed(0)
    for build, *answers in steps:
        drawn = iter(answers)
        step, channels = build(lambda _, drawn=drawn: next(drawn), channels)
        made.append(step)
    network = Network(width, made, channels).double().eval()
    for parameter in network.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn_like(parameter) * 0.5 + 0.2)
    return network


def _cut(_: Any, width: int) -> tuple[Step, int]:
    return Step("scale and cut", lambda x, w: torch.cat([x[..., 3:] * w()[3:], x[..., :3]], -1), w=Vector(width)), width


@functools.cache
def programs() -> tuple[Program, ...]:
    """A few networks that between them call most rules; untyped."""
    made = [
        _network(6, (_attention, 2, 2, 4, "apart", True, False), (_norm, "layer")),
        _network(8, (_attention, 2, 1, 4, "fused", False, True), (_norm, "group", 2), (_regroup, 2, "shuffle")),
        _network(6, (_convolution, 2, 2, "shuffled", torch.relu), (_norm, "rms")),
        _network(6, (_convolution, 1, 2, "image", torch.relu), (_position, "mirror", 1, [1, 0])),
        _network(6, (_recurrent, nn.GRU, 4, False), (_experts, 3, 4, True)),
        _network(6, (_position, "order, add", 1, [2, 3, 0, 1, 5, 4]), (_regroup, 3, "interleave"), (_cut,)),
    ]
    x = torch.randn(2, PLACES, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return tuple(trace(network, (x,), dynamic={}) for network in made)


@contextmanager
def broken(how: Break) -> Iterator[None]:
    """The rule of one operation is wrong in here."""
    counts: weakref.WeakKeyDictionary[Op, int] = weakref.WeakKeyDictionary()

    def turn(op: Op) -> bool:
        """Whether this is the call within the rule that is to be broken."""
        counts[op] = counts.get(op, -1) + 1
        return op_name(op.node.target) == how.name and counts[op] == how.at

    unify, event, rule = Op.unify, Op._event, registry()._rules[how.name]
    infer = rule.infer

    def wrong_unify(op: Op, a: Any, b: Any) -> bool:
        if not turn(op):
            return unify(op, a, b)
        if how.how == "no tie":
            return True
        axes = [axis for value in op.operands() for axis in value.axes]
        return unify(op, a, axes[how.other % len(axes)])

    def wrong_event(op: Op, *arguments: Any) -> None:
        if not turn(op):
            event(op, *arguments)

    @functools.wraps(infer)  # type: ignore[arg-type]
    def wrong_axes(op: Op, **arguments: Any) -> Any:
        assert infer is not None
        axes = infer(op, **arguments)
        if not isinstance(axes, tuple) or len(axes) < 1:
            return axes
        out = list(axes)
        i, j = how.at % len(out), how.other % len(out)
        if how.how == "axes change places":
            out[i], out[j] = out[j], out[i]
        else:
            out[i] = op.fresh(op.shape[i])
        return tuple(out)

    with ExitStack() as stack:
        if how.how in ("no tie", "another tie"):
            stack.enter_context(mock.patch.object(Op, "unify", wrong_unify))
        elif how.how == "no event":
            stack.enter_context(mock.patch.object(Op, "_event", wrong_event))
        elif how.how == "no size":
            stack.enter_context(mock.patch.dict(registry()._rules, {how.name: replace(rule, resize=None)}))
        else:
            stack.enter_context(mock.patch.dict(registry()._rules, {how.name: replace(rule, infer=wrong_axes)}))
        yield


def names(program: Program, how: str) -> list[str]:
    """Operations of a program whose rule can be broken that way."""
    found = dict.fromkeys(op_name(node.target) for node in program.nodes if node.op == "call_function")
    rules = registry()._rules
    return [name for name in found if name in rules and (rules[name].resize if how == "no size" else rules[name].infer)]


def masks(program: Program, seed: int) -> dict[Var, Mask]:
    random = np.random.default_rng(seed)
    out = {}
    for group in discover(program).prunable:
        mask = random.random(group.size) < 0.6
        mask[random.permutation(group.size)[: group.least]] = True
        out[group.var] = mask
    return out


def translated(before: Program, wrong: Program, keep: dict[Var, Mask]) -> dict[Var, Mask] | None:
    """The masks that the right rules would need for the same tensors; ``None`` where they forbid them."""
    right: dict[Var, Mask] = {}
    wanted = {}
    for name, node in before.holders.items():
        for axis, term in enumerate(before.typing.of(node.name)):
            mask = wanted[name, axis] = mask_of(wrong.typing.of(wrong.holders[name].name)[axis], keep)
            for var in set(variables(resolve(term))):
                if isinstance(var.size, int):
                    left = {int(i) for positions in index_maps(term, var) for i in positions[mask] if i >= 0}
                    right[var] = right.get(var, np.ones(var.size, dtype=bool)) & np.isin(np.arange(var.size), list(left))
    if any(var.frozen is not None and not mask.all() for var, mask in right.items()):
        return None
    agree = all((mask_of(before.typing.of(before.holders[name].name)[axis], right) == mask).all() for (name, axis), mask in wanted.items())
    return right if agree else None


def outcome(program: Program, how: Break, seed: int) -> str:
    """``refused``, ``frozen`` (nothing left to remove), or ``right`` after inputs that the proof has not seen."""
    with broken(how):
        wrong = typed(program)
        keep = masks(wrong, seed)
        if not any((~mask).any() for mask in keep.values()):
            return "frozen"
        try:
            after = remove(wrong, keep)
            prove(wrong, after, keep)
        except IrpruneError:
            return "refused"
    before = typed(program)
    right = translated(before, wrong, keep)
    reference, masks_ = (wrong, keep) if right is None else (before, right)
    for number in range(2):
        x = torch.randn(2, PLACES, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + number))
        with torch.no_grad():
            expected = Masked(reference, masks_).run(x, enable_io_processing=False)
            found = Run(after).run(x, enable_io_processing=False)
        for value, wanted in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True):
            gap = difference(value, wanted)
            assert gap.relative < 1e-9, f"{how}: the proof passed and the program is wrong by {gap.max_abs:.3g}"
    return "right" if right is not None else "right, otherwise"


OUTCOMES: collections.Counter[tuple[str, str]] = collections.Counter()


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize="IRPRUNE_FUZZ" not in os.environ,
)
@given(st.data())
def test_a_broken_rule_never_gives_a_wrong_program(data: st.DataObject) -> None:
    program = data.draw(st.sampled_from(programs()))
    how = data.draw(st.sampled_from(BREAKS))
    name = data.draw(st.sampled_from(names(program, how)))
    found = outcome(program, Break(how, name, data.draw(st.integers(0, 3)), data.draw(st.integers(0, 7))), data.draw(st.integers(0, 9)))
    OUTCOMES[how, found] += 1


@pytest.mark.parametrize("how", BREAKS)
def test_each_kind_of_break_is_refused_somewhere(how: str) -> None:
    """The breaks do break something: the test above would notice."""
    tries = (
        (program, Break(how, name, at, 1 - at)) for program in programs() for name, at in itertools.product(names(program, how), (0, 2))
    )
    assert any(outcome(program, broken_rule, 0) == "refused" for program, broken_rule in tries)
