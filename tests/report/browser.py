"""A headless browser from the command line: what a page measures of itself, and how it looks."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--hide-scrollbars", "--virtual-time-budget=2000", "--enable-logging=stderr", "--allow-file-access-from-files"),
)

# The page stands in a frame, so that its width is exact; the frame's script errors and logs are counted too.
PROBE = """
<!DOCTYPE html><meta charset="utf-8"><body style="margin: 0">
<iframe id="page" src="{page}" style="width: {width}px; height: 900px; border: 0"></iframe>
<pre id="found"></pre>
<script>
function seen(box) { return box.width > 0 && box.height > 0; }
function colour(value) { return value.match(/[\\d.]+/g).map(Number); }
function luminance(c) {
  const [r, g, b] = c.slice(0, 3).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function background(node, view) {
  for (; node; node = node.parentElement) {
    const c = colour(view.getComputedStyle(node).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c;
  }
  return [255, 255, 255];
}
function contrast(a, b) { const [x, y] = [luminance(a), luminance(b)]; return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05); }
addEventListener("load", () => {
  const view = document.getElementById("page").contentWindow, page = view.document, root = page.documentElement;
  const texts = [...page.querySelectorAll("h1, h2, p, td, th, li, code, span, pre, svg text")].filter(
    node => seen(node.getBoundingClientRect()) && [...node.childNodes].some(child => child.nodeType == 3 && child.data.trim()));
  const contrasts = texts.map(node => {
    const style = view.getComputedStyle(node);
    return [contrast(colour(node.closest("svg") ? style.fill : style.color), background(node, view)), node.textContent.trim().slice(0, 40)];
  }).sort((a, b) => a[0] - b[0]);
  const wide = [...page.querySelectorAll("main *")].filter(
    node => !node.closest(".scroll, svg") && node.getBoundingClientRect().right > view.innerWidth + 0.5);
  document.getElementById("found").textContent = JSON.stringify({
    width: view.innerWidth, scroll: root.scrollWidth, height: root.scrollHeight,
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    sections: [...page.querySelectorAll("section")].map(node => node.id),
    tops: Object.fromEntries([...page.querySelectorAll("section")].map(node => [node.id, node.getBoundingClientRect()]).map(
      ([id, box]) => [id, [box.top + view.scrollY, box.bottom + view.scrollY]])),
    marks: [...page.querySelectorAll("svg")].filter(node => seen(node.getBoundingClientRect())).map(
      node => node.querySelectorAll("title").length),
    small: Math.min(...[...page.querySelectorAll("svg text")].map(node => node.getBoundingClientRect().height).filter(Boolean), 99),
    contrast: contrasts[0], wide: wide.slice(0, 5).map(node => node.outerHTML.slice(0, 120)), scripts: page.scripts.length,
    outside: [...page.querySelectorAll("[src], link[href], a[href]")].map(n => n.getAttribute("src") || n.getAttribute("href")),
  });
});
</script>
"""


def browser() -> str:
    """The browser's path; the test is skipped where there is none."""
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("SKIPPED: no chromium here to look at the report; install it with `apt-get install chromium`")
    return found


def run(page: Path, *flags: str, dark: bool = False) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as profile:
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        command = [browser(), *FLAGS, scheme, f"--user-data-dir={profile}", *flags, page.resolve().as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def look(page: Path, width: int, *, dark: bool = False) -> dict[str, Any]:
    """What a page measures of itself at a width, with what it wrote to the console under ``errors``."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.html"
        probe.write_text(PROBE.replace("{page}", page.resolve().as_uri()).replace("{width}", str(width)), encoding="utf-8")
        done = run(probe, "--dump-dom", "--window-size=1400,1000", dark=dark)
    said = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert said is not None, done.stdout[-2000:] + done.stderr
    assert said[1], done.stderr
    found: dict[str, Any] = json.loads(html.unescape(said[1]))
    found["errors"] = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return found
