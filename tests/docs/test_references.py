"""Pages that repeat what the code says are up to date, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from irprune import errors
from irprune.errors import IrpruneError
from irprune.pipeline import registry
from irprune.report.passes import markdown

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, IrpruneError) and kind is not IrpruneError]
CODES = {kind.code: kind for kind in KINDS}


def test_every_pass_has_its_page() -> None:
    assert {path.stem for path in ROOT.glob("docs/passes/*.md")} == set(registry.names()), "write them with `make docs`"


@pytest.mark.parametrize("name", registry.names())
def test_pages_of_passes_are_up_to_date(name: str) -> None:
    page = ROOT / "docs" / "passes" / f"{name}.md"
    assert page.read_text(encoding="utf-8") == markdown(registry.find(name)), "write it again with `make docs`"


def test_every_error_has_its_section_with_its_exit_code() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert re.findall(r"^## `(.+)`$", page, flags=re.MULTILINE) == list(CODES)
    told = {section.split("`")[0]: section for section in page.split("\n## `")[1:]}
    for code, kind in CODES.items():
        assert f"Exit code {kind.exit_code}." in told[code]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text):
        path, _, anchor = (target[0] or target[1]).partition("#")
        if path.startswith(("http:", "https:")):
            continue
        file = page.parent / path if path else page
        assert file.exists(), f"{path} is not there"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
