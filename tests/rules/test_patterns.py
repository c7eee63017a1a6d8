"""Coupling patterns: what must be prunable, and that removing any of it is right."""

from __future__ import annotations

import pytest
from nets import check_all, check_zeroing, net, text
from op_table import Case
from pattern_table import PATTERNS

from irprune.analysis.groups import discover


@pytest.mark.parametrize("case", PATTERNS, ids=lambda case: case.name)
def test_the_pattern_is_pruned_and_proven(case: Case) -> None:
    program = net(case.fn, *case.inputs, dynamic=case.dynamic)
    assert program.typing.diagnostics == []
    groups = discover(program)
    assert text(groups) == case.groups
    check_all(program, groups, least=case.least)
    if case.zeroing:
        check_zeroing(program, groups)
