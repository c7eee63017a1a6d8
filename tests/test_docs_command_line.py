"""Every command of docs/command-line.md runs, in the order of the page."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from irprune import cli, errors
from irprune.cli import app

PAGE = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).with_name("small_model.py"), "model.py")
    Path("pipeline.toml").write_text(blocks("toml")[0])
    lines = [line.removeprefix("$ irprune ") for block in blocks("console") for line in block.splitlines()]
    assert len(lines) == 13
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
