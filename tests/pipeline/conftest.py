"""The toy passes are the ones that exist, registered as a third party would."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from irprune.pipeline import registry

POINTS = {"paint": "Paint", "weigh": "Weigh", "cut": "Cut", "must": "Must", "broken": "Missing"}


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint(name, f"toy_passes:{cls}", registry.GROUP) for name, cls in POINTS.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
