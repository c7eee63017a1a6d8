#!/usr/bin/env python3
"""The pictures of reports in docs/images: every example is run, its report opened in a headless browser.

    python tools/screenshots.py                 runs the examples, then takes every picture (make screenshots)
    python tools/screenshots.py --runs DIR      keeps the runs in DIR, and takes those that are there
    python tools/screenshots.py --only digits   pictures of some pages

A page that writes to the console, holds something wider than the screen or text of little contrast is an error: the
pictures are not written then, and it exits 1. stories260k comes from the folder that IRPRUNE_SHARED names
(../shared); its pictures are skipped where that is absent.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import irprune.api as irprune

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "report")]

from browser import look, run  # noqa: E402

MAKE = (ROOT / "Makefile").read_text(encoding="utf-8")
STORIES = (Path(os.environ.get("IRPRUNE_SHARED", ROOT.parent / "shared")) / "data" / "stories260k").resolve()
LEAST_CONTRAST, MOST_KB = 3.0, 200


@dataclass(frozen=True)
class Picture:
    """A part of a page.

    Attributes:
        name: Of the file.
        page: The example whose report it shows, or ``compare``.
        width: Of the screen, in CSS pixels.
        first, last: The sections that it shows; the top of the page and its end where they are empty.
        dark: In dark mode.
    """

    name: str
    page: str
    width: int = 860
    first: str = ""
    last: str = ""
    dark: bool = False


PICTURES = (
    Picture("digits", "digits", last="map"),
    Picture("digits-dark", "digits", first="scores", last="frozen", dark=True),
    Picture("tiny-llama", "tiny_llama", last="map"),
    Picture("tiny-llama-checks", "tiny_llama", first="checks", last="speed"),
    Picture("tiny-llama-phone", "tiny_llama", width=390, last="map"),
    Picture("stories260k", "stories260k", last="scores"),
    Picture("stories260k-phone-dark", "stories260k", width=390, last="map", dark=True),
    Picture("compare", "compare"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", metavar="DIR", type=Path, help="where the runs are, or are to be kept")
    parser.add_argument("--only", metavar="PAGE", nargs="+", help="names of examples, or compare")
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "docs" / "images", help="default: docs/images")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="irprune-") as scratch:
        folder = (options.runs or Path(scratch) / "runs").resolve()
        out = options.out.resolve()
        # Targets by names that say nothing of this machine.
        os.chdir(scratch)
        Path("examples").symlink_to(ROOT / "examples")
        if STORIES.is_dir():
            Path("stories260k").symlink_to(STORIES)
        chosen = options.only or [*examples(), "compare"]
        pages = {name: ran(folder / name, *given) for name, given in examples().items() if name in chosen}
        if "compare" in chosen:
            pages["compare"] = compared(folder)
        faults = [f"{name} at {width} px: {fault}" for name, page in pages.items() for width in (390, 860) for fault in seen(page, width)]
        print(
            "\n".join(faults) or f"{len(pages)} pages at two widths, light and dark: no script error, nothing too wide, all text readable"
        )
        if faults:
            return 1
        out.mkdir(parents=True, exist_ok=True)
        for picture in PICTURES:
            if picture.page in pages:
                taken(picture, pages[picture.page], out / f"report-{picture.name}.png")
    return 0


def examples() -> dict[str, tuple[str, str]]:
    """Target and pipeline of each, as the Makefile has them."""
    (digits,) = re.findall(r"run examples/digits.py --passes '(.*)'", MAKE)
    (llama,) = re.findall(r"^LLM := (.*)$", MAKE, flags=re.MULTILINE)
    found = {"digits": ("examples/digits.py", digits), "tiny_llama": ("examples/tiny_llama.py", llama)}
    if STORIES.is_dir():
        found["stories260k"] = (
            "hf:stories260k",
            "score{criterion=taylor},prune{ratio=0.3},export{cache=true quantise=int8},validate{batch_sizes=[1] lengths=[128] seconds=2}",
        )
    else:
        print(f"SKIPPED: stories260k, {STORIES} is not there")
    return found


def ran(folder: Path, target: str, passes: str) -> Path:
    """The report of an example, which is run where it is not there."""
    if irprune.finished(folder) is None:
        irprune.run(target, passes, out=folder, force=True)
    return irprune.report(folder)


def compared(folder: Path) -> Path:
    """The comparison of three runs of the digits, each pruned more than the one before."""
    target, passes = examples()["digits"]
    runs = [folder / f"digits-{ratio}" for ratio in (0.3, 0.5, 0.7)]
    for run_, ratio in zip(runs, (0.3, 0.5, 0.7), strict=True):
        ran(run_, target, re.sub(r"ratio=[\d.]+", f"ratio={ratio}", passes))
    irprune.compare(runs, out=folder / "compare.html")
    return folder / "compare.html"


def seen(page: Path, width: int) -> list[str]:
    """What is wrong with a page at a width."""
    faults = []
    for dark in (False, True):
        found = look(page, width, dark=dark)
        faults += found["errors"] + [f"too wide: {node}" for node in found["wide"]]
        if found["scroll"] > found["width"]:
            faults.append(f"it scrolls sideways, {found['scroll']} px")
        if found["contrast"][0] < LEAST_CONTRAST:
            faults.append(f"contrast {found['contrast'][0]:.2f} of '{found['contrast'][1]}'{' in dark mode' if dark else ''}")
        if not all(found["marks"]):
            faults.append("a figure shows nothing")
    return faults


def taken(picture: Picture, page: Path, path: Path) -> None:
    """Take a picture, in few colours: a page has few."""
    found = look(page, picture.width, dark=picture.dark)
    tops: dict[str, list[float]] = found["tops"]
    top, bottom = tops[picture.first][0] if picture.first else 0, tops[picture.last][1] if picture.last else found["height"]
    with tempfile.TemporaryDirectory() as scratch:
        # In a frame, since a browser's window has a least width.
        frame, whole = Path(scratch) / "frame.html", Path(scratch) / "page.png"
        style = f"width: {picture.width}px; height: {found['height']}px; border: 0"
        frame.write_text(f'<!DOCTYPE html><body style="margin: 0"><iframe src="{page.resolve().as_uri()}" style="{style}"></iframe>')
        run(frame, f"--screenshot={whole}", f"--window-size=1000,{found['height'] + 200}", dark=picture.dark)
        with Image.open(whole) as image:
            part = image.convert("RGB").crop((0, int(top), picture.width, int(bottom) + 16))
            part.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size / 1000
    print(f"{path.name}: {part.width} x {part.height}, {size:.0f} kB")
    assert size < MOST_KB, f"{path} is too large for the documentation"


if __name__ == "__main__":
    sys.exit(main())
