"""Figures as SVG that takes its colours and its font from the page around it.

matplotlib draws in placeholder colours, which become CSS variables; so one figure suits light and dark
pages. Each figure is drawn twice, for wide and for narrow screens, since text does not shrink well.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

from irprune.report.data import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 700, 340
INK, MUTED, LINE, KEPT, REMOVED, ACCENT = "#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006"
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", KEPT: "kept", REMOVED: "removed", ACCENT: "accent"}
_FONT_PX = 11


class Canvas:
    """A figure in the making.

    Args:
        width: In CSS pixels.
        height: In CSS pixels.
        salt: Keeps the identifiers of figures on one page apart.
    """

    def __init__(self, width: int, height: int, salt: str) -> None:
        from matplotlib.figure import Figure

        self.width, self.height, self.salt = width, height, salt
        self.figure: Figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        self._tips: list[str] = []

    @property
    def narrow(self) -> bool:
        return self.width < WIDE

    def tip(self, text: str) -> str:
        """An identifier for an artist (``set_gid``) that is shown with this text under the pointer."""
        self._tips.append(text)
        return f"tip-{len(self._tips) - 1}-"

    def svg(self, label: str) -> str:
        """The figure as an ``<svg>`` element."""
        import matplotlib

        sink = io.StringIO()
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.salt, "text.parse_math": False}):
            self.figure.savefig(
                sink, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Type": None, "Format": None}
            )
        text = sink.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
        for colour, name in _VARIABLES.items():
            text = text.replace(colour, f"var(--{name})")
        text = re.sub(r"font: ([\d.]+)px[^;\"]*", r"font-size: \1px", text)
        text = re.sub(r"font-family: [^;\"]*;?", "", text)
        text = re.sub(r'<g id="tip-(\d+)-">', lambda found: f"<g><title>{escape(self._tips[int(found[1])])}</title>", text)
        text = re.sub(r'<g id="[^"]*">', "<g>", text)
        head = f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label, quote=True)}" '
        head += f'class="{"narrow" if self.narrow else "wide"}" xmlns:xlink="http://www.w3.org/1999/xlink">'
        return head + text[text.index(">") + 1 :]


def both(draw: Callable[[Canvas], None], height: Callable[[bool], int], label: str, salt: str) -> str:
    """A figure for wide and for narrow screens; the page shows one of them.

    Args:
        draw: Draws it.
        height: Whether it is narrow to its height in pixels.
        label: What it shows, for those who do not see it.
        salt: See :class:`Canvas`.
    """
    found = []
    for width in (WIDE, NARROW):
        canvas = Canvas(width, height(width == NARROW), f"{salt}-{width}")
        draw(canvas)
        found.append(canvas.svg(label))
    return "".join(found)


def bare(axes: Axes) -> None:
    """Only a base line, with quiet labels."""
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(LINE)
    axes.tick_params(colors=LINE, labelcolor=MUTED, labelsize=_FONT_PX, length=3)
    axes.set_facecolor("none")


def spreads(of: Sequence[Spread]) -> str:
    """One histogram for each kind of groups: what went, what stayed, and the cut-off between."""

    def draw(canvas: Canvas) -> None:
        import numpy as np

        grid = canvas.figure.subplots(len(of), 1, squeeze=False)
        for spread, (axes,) in zip(of, grid, strict=True):
            edges = np.array(spread.edges)
            bottom = np.zeros(len(edges) - 1)
            for counts, colour, verb in ((spread.removed, REMOVED, "removed"), (spread.kept, KEPT, "kept")):
                bars = axes.bar(edges[:-1], counts, np.diff(edges) * 0.92, bottom=bottom, align="edge", color=colour, linewidth=0)
                for bar, count, low, high in zip(bars, counts, edges, edges[1:], strict=False):
                    if count:
                        bar.set_gid(canvas.tip(f"{count:,} {verb}: {_place(low, spread.log)} to {_place(high, spread.log)}"))
                    else:
                        bar.set_visible(False)
                bottom += np.array(counts)
            bare(axes)
            top = max(float(bottom.max()), 1.0)
            axes.set_ylim(0, top * 1.22)
            axes.axvline(0, color=INK, linewidth=1, dashes=(3, 3))
            axes.set_yticks([])
            title = f"{spread.kind}: {sum(spread.removed):,} of {sum(spread.removed) + sum(spread.kept):,} removed"
            title += f", {spread.groups} group" + ("s" if spread.groups > 1 else "")
            axes.set_title(title, loc="left", color=INK, fontsize=_FONT_PX + 1)
            place = {"xytext": (-4, 0), "textcoords": "offset points", "ha": "right", "va": "top"}
            axes.annotate("cut-off", (0, top * 1.2), color=MUTED, fontsize=_FONT_PX, **place)
            ticks = [tick for tick in axes.get_xticks() if edges[0] <= tick <= edges[-1]]
            ticks = ticks[:: -(-len(ticks) // (5 if canvas.narrow else 9))]
            axes.set_xticks(ticks, [_place(tick, spread.log) for tick in ticks])
            axes.set_xlim(edges[0], edges[-1])
            unit = (
                "score, as a multiple of the cut-off of its group" if spread.log else "score minus the cut-off of its group, in deviations"
            )
            if spread is of[-1]:
                axes.set_xlabel(unit, color=MUTED, fontsize=_FONT_PX, loc="left")

    told = "; ".join(f"{spread.kind}: {sum(spread.removed)} removed, {sum(spread.kept)} kept" for spread in of)
    return both(draw, lambda narrow: 28 + 150 * len(of), f"Distribution of scores around the cut-off. {told}", "spreads")


def _place(value: float, log: bool) -> str:
    return f"{10**value:.3g} x" if log else f"{value:+.2g}"


def curves(series: dict[str, list[tuple[float, float]]]) -> str:
    """Losses over steps, each line named at its end."""

    def draw(canvas: Canvas) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = canvas.figure.subplots()
        bare(axes)
        for (name, points), colour in zip(series.items(), (KEPT, REMOVED, ACCENT, MUTED), strict=False):
            xs, ys = zip(*points, strict=True)
            (line,) = axes.plot(xs, ys, color=colour, linewidth=1.6)
            line.set_gid(canvas.tip(f"{name}: from {ys[0]:.4g} to {ys[-1]:.4g}, least {min(ys):.4g}"))
            axes.annotate(
                f"{name} {ys[-1]:.3g}",
                (xs[-1], ys[-1]),
                xytext=(0, 5),
                textcoords="offset points",
                ha="right",
                color=colour,
                fontsize=_FONT_PX,
            )
        axes.grid(axis="y", color=LINE, linewidth=0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("step", color=MUTED, fontsize=_FONT_PX, loc="left")

    told = "; ".join(f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in series.items())
    return both(draw, lambda narrow: 220 if narrow else 260, f"Loss over steps. {told}", "curves")


def scatter(
    points: Sequence[tuple[str, float, float]],
    front: Sequence[int],
    across: str,
    up: str,
    better: str,
    salt: str,
    *,
    before: float | None = None,
) -> str:
    """Runs by size and quality, with the Pareto front.

    Args:
        points: Name, size and quality of each run.
        front: Which of them no other run beats in both, in order of size.
        across: What the size is.
        up: What the quality is.
        better: Which side is better, in words.
        salt: See :class:`Canvas`.
        before: The quality of the unpruned model, which has all of the size.
    """

    def draw(canvas: Canvas) -> None:
        axes = canvas.figure.subplots()
        bare(axes)
        axes.spines["left"].set_visible(True)
        if len(front) > 1:
            axes.plot(
                [points[one][1] for one in front],
                [points[one][2] for one in front],
                color=ACCENT,
                linewidth=1.2,
                zorder=1,
                drawstyle="steps-post",
            )
        for number, (name, x, y) in enumerate(points):
            best = number in front
            (dot,) = axes.plot([x], [y], "o", markersize=7, color=ACCENT if best else "none", markeredgecolor=ACCENT if best else MUTED)
            dot.set_gid(canvas.tip(f"{name}: {across} {x:.4g}, {up} {y:.4g}"))
            axes.annotate(
                name, (x, y), xytext=(0, 7), textcoords="offset points", ha="center", color=INK if best else MUTED, fontsize=_FONT_PX
            )
        if before is not None:
            (cross,) = axes.plot([1.0], [before], "x", markersize=7, color=MUTED)
            cross.set_gid(canvas.tip(f"unpruned: {up} {before:.4g}"))
            axes.annotate("unpruned", (1.0, before), xytext=(0, 7), textcoords="offset points", ha="center", color=MUTED, fontsize=_FONT_PX)
        axes.margins(0.16, 0.16)
        axes.grid(color=LINE, linewidth=0.4)
        axes.set_axisbelow(True)
        axes.set_xlabel(across, color=MUTED, fontsize=_FONT_PX, loc="left")
        axes.set_title(f"{up} ({better})", loc="left", color=INK, fontsize=_FONT_PX + 1)

    told = "; ".join(f"{name}: {x:.4g}, {y:.4g}" for name, x, y in points)
    return both(draw, lambda narrow: 280 if narrow else 340, f"{up} against {across}. {told}", salt)
