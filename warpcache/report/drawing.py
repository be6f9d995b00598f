"""What every chart of a report is drawn with: matplotlib SVG that takes its colours and its font from the page.

Matplotlib knows no CSS variables, so the charts are drawn in stand-in colours that are exchanged in the SVG text for
``var(--ink)`` and the like. One drawing then serves the light and the dark page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis

__all__ = ["DOTS", "PAPER", "SERIES", "TEXT", "Chart", "drawing", "logarithmic", "round_steps", "whole_numbers"]

TEXT, RULE, PAPER = "#010203", "#020304", "#030405"
SERIES = ("#0a0b00", "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04")
_VARIABLES = {TEXT: "--muted", RULE: "--rule", PAPER: "--card"} | {
    color: f"--series-{index}" for index, color in enumerate(SERIES)
}
DOTS: dict[str, Any] = {"marker": "o", "markersize": 6, "markeredgecolor": PAPER, "markeredgewidth": 1.4}
"""How a measured value is marked on a line."""
_WIDTH, _HEIGHT = 4.5, 2.9  # inches of 72 points; a card on the page is about as wide
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.labelsize": 10.5,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "xtick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Chart:
    """One figure of the report.

    Attributes:
        title: What it shows.
        note: How to read it, one sentence; may be empty.
        svg: The drawing, an ``<svg>`` element.
        wide: Whether it takes the page's whole width.
    """

    title: str
    note: str
    svg: str
    wide: bool = False


@contextmanager
def drawing(name: str, *, wide: bool = False) -> Iterator[tuple[Axes, Any]]:
    """Axes of a chart in the report's style, and a function that gives their SVG (call it after drawing).

    Args:
        name: What the chart is called in the page; ids in the drawing begin with it.
        wide: For a chart that takes the page's whole width.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Figure and not pyplot: no global state, no window system. The salt makes ids differ from chart to chart (they
    # share one page) and not from run to run.
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(2.3 * _WIDTH, 1.35 * _HEIGHT) if wide else (_WIDTH, _HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        text: list[str] = []

        def svg() -> str:
            return text[0]

        yield axes, svg
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        text.append(_for_page(buffer.getvalue(), name))


def round_steps(values: Iterable[float]) -> list[float]:
    """Round numbers (1, 2, 5, 10, ...) from just below the least of the values to just above the greatest."""
    steps = [step * 10.0**power for power in range(-6, 8) for step in (1, 2, 5)]
    known = list(values)
    low = max((step for step in steps if step <= min(known) * (1 + 1e-9)), default=steps[0])
    high = min((step for step in steps if step >= max(known) * (1 - 1e-9)), default=steps[-1])
    return [step for step in steps if low <= step <= high]


def logarithmic(axis: XAxis | YAxis, ticks: Sequence[float], limits: tuple[float, float], *, scale: float = 1) -> None:
    """Make an axis logarithmic.

    Args:
        axis: ``axes.xaxis`` or ``axes.yaxis``.
        ticks: Where lines are drawn and labelled.
        limits: From where to where it goes.
        scale: What the labels are multiplied by, e.g. 100 for percent.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.axes.set(**{f"{axis.axis_name}lim": limits})
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * scale:g}"))


def whole_numbers(axis: XAxis | YAxis) -> None:
    """Label an axis at whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _for_page(svg: str, name: str) -> str:
    """Take a matplotlib SVG file to an element for an HTML page: its colours, no outside addresses, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows what <svg> is
    svg = re.sub(
        r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{name}">', svg, count=1
    )
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("xlink:href=", "href=")
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.strip()
