"""Every command of docs/command-line.md runs, in the order of the page; so does docs/python.md."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from irprune import cli, errors
from irprune.cli import app

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "command-line.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).with_name("small_model.py"), "model.py")
    Path("pipeline.toml").write_text(blocks("toml")[0])
    lines = [line.removeprefix("$ irprune ") for block in blocks("console") for line in block.splitlines()]
    assert len(lines) == 16
    for line in lines:
        result = CliRunner().invoke(app, shlex.split(line))
        assert result.exit_code == 0, f"{line}\n{result.output}"
    listed = re.findall(r"^\| `([\w.]+)` \|", PAGE, flags=re.MULTILINE)
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(listed)


def test_the_exit_codes_of_the_page() -> None:
    told = dict(re.findall(r"^\| (\d+) \| (.*) \|$", PAGE, flags=re.MULTILINE))
    assert "\n\n".join(["Exit codes:", *(f"{code} {text}" for code, text in told.items())]) == cli.EXIT_CODES
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.IrpruneError)]
    assert {str(cls.exit_code) for cls in classes} <= told.keys()


def test_the_python_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (source,) = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(source, names)
    assert names["result"].path == Path("runs/sequential-1")
    assert names["result"].manifest.model.after.params < 0.7 * names["result"].manifest.model.before.params
