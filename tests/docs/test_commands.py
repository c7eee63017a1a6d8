"""Every command and every Python example of the documentation runs.

A page is run from top to bottom in an empty directory of its own: ``console`` blocks command by command,
what a block shows below ``$ command`` is compared with what the command prints; ``bash`` and ``python``
blocks as they are, all Python of a page in one namespace. A line ``...`` of an output stands for any lines.
A comment on the line above a block says what is special about it:

    <!-- file: model.py -->      the block is the content of that file
    <!-- not run: reason -->     the block is only for reading
    <!-- exit: 3 -->             its last command ends with this code
    <!-- figures vary -->        numbers of its output differ from machine to machine
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from irprune.cli import app

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"docs/style.md": "examples of style, not of use", "docs/command-line.md": "test_docs_command_line.py runs it"}
PAGES = [
    page
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
    if page.relative_to(ROOT).as_posix() not in ELSEWHERE and "passes" not in page.parts
]
_BLOCK = re.compile(r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
MARKS = ("", "file", "not run", "exit", "figures vary")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with the mark above it and what that says."""

    language: str
    text: str
    mark: str
    value: str
    line: int


def blocks(text: str) -> list[Block]:
    found = []
    for match in _BLOCK.finditer(text):
        mark, _, value = (match["mark"] or "").partition(": ")
        assert mark in MARKS, f"the mark '{mark}' is not known"
        assert bool(value) == (mark in ("file", "not run", "exit")), f"'{mark}' is to be followed by what or why"
        found.append(Block(match["language"], match["text"], mark, value, text.count("\n", 0, match.start("text"))))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    monkeypatch.syspath_prepend(str(tmp_path))
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page.read_text(encoding="utf-8")):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.mark == "file":
            write(Path(block.value), block.text)
        elif block.mark == "not run":
            continue
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True), namespace)
        elif block.language == "console":
            console(block, where)
        elif block.language == "bash":
            done = subprocess.run(["bash", "-euc", block.text], capture_output=True, text=True, stdin=subprocess.DEVNULL)
            assert done.returncode == 0, f"{where}\n{done.stdout}{done.stderr}"


def write(path: Path, text: str) -> None:
    """Write a file of a page. A project with entry points in the page's directory is then found as if it were installed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    project = tomllib.loads(text).get("project", {}) if path.name == "pyproject.toml" else {}
    if "entry-points" in project:
        info = path.parent / f"{project['name']}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
        groups = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in project["entry-points"].items())
        (info / "entry_points.txt").write_text("\n".join(groups))
        importlib.invalidate_caches()


def console(block: Block, where: str) -> None:
    steps = [step for step in re.split(r"^\$ ", block.text, flags=re.MULTILINE) if step.strip()]
    for number, step in enumerate(steps, 1):
        command, _, shown = re.sub(r"\\\n\s*", "", step).partition("\n")
        code, output = execute(command)
        wanted = int(block.value) if block.mark == "exit" and number == len(steps) else 0
        assert code == wanted, f"{where}: `{command}` ends with {code}\n{output}"
        told = f"{where}: `{command}` prints\n{output}\nthe page shows\n{shown}"
        assert not shown.strip() or matches(shown, output, block.mark == "figures vary"), told


def execute(command: str) -> tuple[int, str]:
    """Exit code and everything printed. The command line of irprune runs in this process, which saves its start."""
    if command.startswith("irprune ") and not re.search(r"[|><&]", re.sub(r"'[^']*'", "", command)):
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        return result.exit_code, result.output
    done = subprocess.run(["bash", "-euc", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout


def matches(shown: str, output: str, vary: bool) -> bool:
    """Whether an output is what the page shows: lines ``...`` stand for any lines, blanks at line ends do not count."""

    def plain(line: str) -> str:
        line = line.rstrip()
        if vary:
            line = re.sub(r"\d[\d,.]*(e[-+]?\d+)?", "0", line)
            line = re.sub(r"\s+", " ", re.sub(r"─+", "─", line))
        return line

    parts = [r".*" if line.strip() == "..." else re.escape(plain(line)) for line in shown.strip().splitlines()]
    return re.fullmatch(r"\n".join(parts), "\n".join(plain(line) for line in output.strip().splitlines()), flags=re.DOTALL) is not None


def test_blocks_and_their_marks_are_read() -> None:
    text = "text\n<!-- file: a.toml -->\n```toml\nx = 1\n```\n\n```console\n$ a\n```\n<!-- exit: 2 -->\n```console\n$ b\n```\n"
    assert blocks(text) == [
        Block("toml", "x = 1\n", "file", "a.toml", 3),
        Block("console", "$ a\n", "", "", 7),
        Block("console", "$ b\n", "exit", "2", 11),
    ]


@pytest.mark.parametrize("mark", ["exits: 2", "exit", "not run", "figures vary: much"])
def test_marks_that_say_nothing_are_refused(mark: str) -> None:
    with pytest.raises(AssertionError, match=r"not known|followed by"):
        blocks(f"<!-- {mark} -->\n```bash\nfalse\n```\n")


@pytest.mark.parametrize(
    ("shown", "output", "vary", "same"),
    [
        ("a\n...\nc\n", "a\nb\nb\nc\n", False, True),
        ("a\nc\n", "a\nb\nc\n", False, False),
        ("1.5 ms", "1.6 ms", False, False),
        ("latency   12.5  ──", "latency 9.25  ────", True, True),
        ("latency 12.5", "duration 12.5", True, False),
    ],
)
def test_outputs_are_compared(shown: str, output: str, vary: bool, same: bool) -> None:
    assert matches(shown, output, vary) is same
