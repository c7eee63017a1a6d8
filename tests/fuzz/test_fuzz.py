"""Random networks with random keep masks: what is removed is exactly what is masked.

``IRPRUNE_FUZZ=2000 pytest tests/fuzz`` takes that many networks instead of a few; ``tools/fuzz.py`` is the long run.
"""

from __future__ import annotations

import os

import hypothesis
import numpy as np
import torch
from fuzz_networks import PLACES, Network, networks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irprune.analysis.cost import Cost
from irprune.analysis.groups import discover
from irprune.backend.proof import prove
from irprune.backend.rewrite import remove
from irprune.frontend.export import trace
from irprune.ir.dims import Mask, Var
from irprune.ir.facts import Groups
from irprune.ir.program import Program
from irprune.rules.infer import typed

EXAMPLES = int(os.environ.get("IRPRUNE_FUZZ", "100"))
SEED = os.environ.get("IRPRUNE_FUZZ_SEED")


def traced(network: Network) -> Program:
    random = torch.Generator().manual_seed(1)
    return trace(network, (torch.randn(2, PLACES, 5, dtype=torch.float64, generator=random),), dynamic={})


def random_masks(groups: Groups, data: st.DataObject) -> dict[Var, Mask]:
    """Some of the prunable groups, each with a random mask that keeps as many indices as it must."""
    keep = {}
    for group in groups.prunable:
        if not data.draw(st.integers(0, 3)):
            continue
        mask = np.array(data.draw(st.lists(st.booleans(), min_size=group.size, max_size=group.size)))
        if mask.sum() >= group.least:
            keep[group.var] = mask
    return keep


def prune_and_prove(network: Network, data: st.DataObject) -> int:
    """Remove random indices, prove it, and hold the cost model to what is left.

    Returns:
        How many indices were removed.
    """
    program = typed(traced(network))
    assert not program.typing.diagnostics, f"{network}: {program.typing.diagnostics}"
    keep = random_masks(discover(program), data)
    smaller = remove(program, keep)
    report = prove(program, smaller, keep)
    assert report["numbers"]["max_abs_err"] <= report["numbers"]["tolerance"]
    counts = {var: int(mask.sum()) for var, mask in keep.items()}
    assert Cost(program).params(counts) == sum(t.numel() for n, t in smaller.tensors.items() if smaller.is_parameter(n))
    assert Cost(program).macs(counts) == Cost(smaller).macs()
    return sum(int((~mask).sum()) for mask in keep.values())


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(networks(), st.data())
def test_pruned_equals_masked(network: Network, data: st.DataObject) -> None:
    prune_and_prove(network, data)


if SEED is not None:
    test_pruned_equals_masked = hypothesis.seed(int(SEED))(test_pruned_equals_masked)
