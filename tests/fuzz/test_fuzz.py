"""Random networks with random keep masks: what is removed is exactly what is masked.

``IRPRUNE_FUZZ=5000 pytest tests/fuzz`` runs that many networks; the default is short.
"""

from __future__ import annotations

import os

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
from irprune.rules.infer import typed

EXAMPLES = int(os.environ.get("IRPRUNE_FUZZ", "120"))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(networks(), st.data())
def test_pruned_equals_masked(network: Network, data: st.DataObject) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, PLACES, 5, dtype=torch.float64)
    program = typed(trace(network, (x,), dynamic={}))
    assert not program.typing.diagnostics, f"{network}: {program.typing.diagnostics}"
    keep = {}
    for group in discover(program).prunable:
        if not data.draw(st.integers(0, 3)):
            continue
        mask = np.array(data.draw(st.lists(st.booleans(), min_size=group.size, max_size=group.size)))
        if mask.any():
            keep[group.var] = mask
    smaller = remove(program, keep)
    report = prove(program, smaller, keep)
    assert report["numbers"]["max_abs_err"] <= report["numbers"]["tolerance"]
    counts = {var: int(mask.sum()) for var, mask in keep.items()}
    assert Cost(program).params(counts) == sum(t.numel() for n, t in smaller.tensors.items() if smaller.is_parameter(n))
    assert Cost(program).macs(counts) == Cost(smaller).macs()
