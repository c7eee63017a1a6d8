"""Slicing what a rule ties gives the same numbers as slicing the answer, for every operation.

Each row of the tables is traced, pruned with random masks (every group alone, all together, all down
to one index) and compared with the original operation by operation. A new rule needs a row.
"""

from __future__ import annotations

import op_table_shapes  # noqa: F401  (adds its rows)
import pytest
import torch
from nets import check_all, check_zeroing, net, text
from op_table import CASES, Case

from irprune.analysis.groups import discover
from irprune.rules.registry import OpRule, op_name, registry

# Rules without a row, and why.
ELSEWHERE = {
    "aten::_assert_tensor_metadata": "it gives no tensor",
    "aten::_batch_norm_with_update": "it changes running statistics, which evaluation mode never does",
    "aten::_grouped_mm": "it wants bfloat16 and a fitting device; models of routed experts are traced with the next one",
    "transformers::grouped_mm_fallback": "it is registered by transformers",
    "aten::_index_put_impl_": "the trace gives index_put",
    "aten::_native_multi_head_attention": "it is an inference kernel that a trace does not choose",
    "aten::_transformer_encoder_layer_fwd": "it is an inference kernel that a trace does not choose",
    "aten::chain_matmul": "it warns of its own end; linalg_multi_dot has the same rule",
    "aten::cudnn_batch_norm": "it wants a GPU",
    "aten::lift_fresh": "the trace gives lift_fresh_copy",
    "aten::pin_memory": "it wants a GPU",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_slicing_what_is_tied_is_slicing_the_answer(case: Case) -> None:
    program = net(case.fn, *case.inputs, dynamic=case.dynamic)
    traced = {op_name(node.target) for node in program.nodes if node.op == "call_function"}
    assert case.ops - traced == set(), f"the trace does not have these operations, but {sorted(traced)}"
    groups = discover(program)
    assert text(groups) == case.groups
    check_all(program, groups, stepwise=case.stepwise, least=case.least)
    if case.zeroing:
        check_zeroing(program, groups)


def _ours(rule: OpRule) -> bool:
    """Whether the rule is irprune's own: another test of the same process may have added some."""
    functions = (rule.infer, rule.resize, rule.renormalise)
    return any(function.__module__.startswith("irprune.") for function in functions if function is not None)


def test_every_rule_has_a_row() -> None:
    covered = {name for case in CASES for name in case.ops} | set(ELSEWHERE)
    inplace = {name for name in covered if name.endswith("_")}
    rules = {name for name, rule in registry()._rules.items() if _ours(rule)}
    assert rules - covered == set()
    assert covered - rules - inplace == set(), "a row or reason without a rule"


def test_every_rule_is_of_an_operation_that_exists() -> None:
    missing = [name for name in registry()._rules if name.startswith("aten::") and not hasattr(torch.ops.aten, name.removeprefix("aten::"))]
    assert missing == []
