"""What the tools and examples import from irprune is there: most of them take too long to be run by a test."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "file", [pytest.param(file, id=file.name) for part in ("tools", "examples") for file in sorted((ROOT / part).glob("*.py"))]
)
def test_what_is_imported_exists(file: Path) -> None:
    wanted = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("irprune", "irprune_passes")
        for alias in node.names
    ]
    missing = [f"{module}.{name}" for module, name in wanted if not _has(module, name)]
    assert not missing


def _has(module: str, name: str) -> bool:
    if hasattr(importlib.import_module(module), name):
        return True
    try:
        importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return False
    return True
