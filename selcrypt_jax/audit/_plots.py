"""The plots of an audit, in one column of panels, which is readable on a phone."""

import io
import math
import textwrap
import xml.dom.minidom
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from .._io.errors import counted
from ._records import Best, SubjectReport
from ._words import data_name

# Wong's palette, which is safe for colour-blind readers, without its yellow, which is too pale on
# white. Black is for the baseline.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "os^Dv*P"
_LINES: tuple[Any, ...] = ("-", (0, (1, 1)), "-.", (0, (5, 1)), (0, (3, 1, 1, 1)))
_GREY = "0.45"
_FONT: Any = {"font.size": 10.5, "legend.fontsize": 10, "axes.titlesize": 10.5}
_WIDTH, _PANEL, _ROW = 4.2, 2.5, 0.2  # inches


_Style = dict[str, Any]
_BASELINE: _Style = {"color": "black", "marker": ".", "linestyle": "--"}


@matplotlib.rc_context(_FONT)
def draw_curves(report: SubjectReport) -> Figure:
    """Metric against the attacker's steps.

    One panel for each share of data, the largest first. One curve for each protection: the best
    attack, averaged over keys, shaded from the worst key to the best.
    """
    alone = f"{report.alone} alone"
    styles = _styles(report) | {alone: _BASELINE}
    of = {protection.name: protection.best for protection in report.protections}
    of[alone] = report.baseline
    every = [best for rows in of.values() for best in rows]
    shares = sorted({best.data for best in every}, reverse=True)
    place = _on_log_axis(best.steps for best in every)
    names = [*of, "original"]
    figure, panels = _panels(report, len(shares), names)
    for axis, data in zip(panels, shares, strict=False):
        handles = [
            _curve(axis, [row for row in rows if row.data == data], place, styles[name])
            for name, rows in of.items()
        ]
        handles.append(axis.axhline(report.clean, color=_GREY, linewidth=1.5, zorder=1))
        axis.set(title=data_name(data), ylabel=f"quality, {report.unit}")
        axis.set_xlabel("training steps of the attacker")
        _log_ticks(axis, place, lambda steps: f"{steps:,g}")
        _legend(figure, handles, names)
    return figure


@matplotlib.rc_context(_FONT)
def draw_advantage(report: SubjectReport) -> Figure:
    """Advantage, with its interval, against the share of all weights that is encrypted.

    One panel for each share of data, the largest first, at the largest number of steps. One line
    for each strategy.
    """
    every = [best for protection in report.protections for best in protection.best]
    shares = sorted({best.data for best in every}, reverse=True)
    strategies = _strategies(report)
    place = _on_log_axis(protection.share for protection in report.protections)
    names = [*strategies, f"0: no more than the {report.alone}", "0.1"]
    figure, panels = _panels(report, len(shares), names)
    for axis, data in zip(panels, shares, strict=False):
        steps = max(best.steps for best in every if best.data == data)
        handles: list[Any] = []
        for index, strategy in enumerate(strategies):
            # Offset a little, since intervals at the same share would overlap.
            aside = math.exp(0.015 * _width(place) * (index - (len(strategies) - 1) / 2))
            found = sorted(
                (place[protection.share] * aside, best.advantage)
                for protection in report.protections
                for best in protection.best
                if protection.strategy == strategy
                and (best.data, best.steps) == (data, steps)
                and best.advantage is not None
            )
            handles.append(_intervals(axis, found, _style(index, index // len(_COLOURS))))
        handles.append(axis.axhline(0, color="black", linewidth=1, zorder=1))
        handles.append(axis.axhline(0.1, color=_GREY, linestyle="--", linewidth=1, zorder=1))
        axis.set(title=f"{data_name(data)}, {counted(steps, 'step')}", ylabel="advantage")
        axis.set_xlabel("encrypted share of all weights, %")
        _log_ticks(axis, place, lambda share: f"{100 * share:.2g}" if share < 1 else "100")
        _legend(figure, handles, names)
    return figure


@matplotlib.rc_context(_FONT)
def draw_levels(report: SubjectReport) -> Figure:
    """Metric by permission level, for the protections whose levels were measured.

    A line shows what the strongest attacker reaches without the file: levels below it are worth
    nothing to them.
    """
    styles = _styles(report)
    with_levels = [protection for protection in report.protections if protection.levels]
    alone = max(report.baseline, key=lambda row: (row.data, row.steps), default=None)
    names = [protection.name for protection in with_levels]
    names += [f"{report.alone} alone, trained"] * (alone is not None) + ["original"]
    figure, (axis,) = _panels(report, len(with_levels[:1]), names)
    handles: list[Any] = []
    for protection in with_levels:
        numbers = [level.level for level in protection.levels]
        metrics = [level.metric for level in protection.levels]
        handles += axis.plot(numbers, metrics, **styles[protection.name])
    if with_levels:
        if alone is not None:
            reached = float(np.mean(alone.recovered))
            line = reached if math.isfinite(reached) else math.nan
            handles.append(axis.axhline(line, color="black", linestyle="--", linewidth=1, zorder=1))
        handles.append(axis.axhline(report.clean, color=_GREY, linewidth=1.5, zorder=1))
        axis.set(xlabel="permission level (0: no key)", ylabel=f"quality, {report.unit}")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, handles, names)
    return figure


def inline_svg(figure: Figure, prefix: str, label: str) -> str:
    """A figure as an SVG element for an HTML page.

    Args:
        figure: the figure.
        prefix: prefix of all ids, which Matplotlib numbers from 1 in each figure.
        label: alternative text.

    Returns:
        ``<svg …>``, without prolog, metadata and size; it fills the width of its container.
    """
    figure.suptitle("")  # the page has headings
    file = io.BytesIO()
    # Text stays text: for search, for screen readers, and for a small page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    svg = xml.dom.minidom.parseString(file.getvalue()).documentElement
    assert svg is not None
    for element in (svg, *svg.getElementsByTagName("*")):
        for name, value in list(element.attributes.items()):
            if name == "id":
                element.setAttribute(name, f"{prefix}-{value}")
            elif name in ("href", "xlink:href") and value.startswith("#"):
                element.setAttribute(name, f"#{prefix}-{value[1:]}")
            elif "url(#" in value:
                element.setAttribute(name, value.replace("url(#", f"url(#{prefix}-"))
    for definitions in svg.getElementsByTagName("defs"):
        for style in definitions.getElementsByTagName("style"):
            definitions.removeChild(style)  # it would apply to the whole page
    for name in ("width", "height"):
        svg.removeAttribute(name)  # the page sets the width; the viewBox, the height
    svg.setAttribute("role", "img")
    svg.setAttribute("aria-label", label)
    return svg.toxml()


def _strategies(report: SubjectReport) -> list[str]:
    return list(dict.fromkeys(protection.strategy for protection in report.protections))


def _style(colour: int, number: int) -> _Style:
    return {
        "color": _COLOURS[colour % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _LINES[number % len(_LINES)],
    }


def _styles(report: SubjectReport) -> dict[str, _Style]:
    """A colour for each strategy, as in the plot of advantages, and a marker for each share.

    If there is only one strategy, a colour for each protection.
    """
    strategies = _strategies(report)
    styles: dict[str, _Style] = {}
    used: Counter[int] = Counter()
    for index, protection in enumerate(report.protections):
        colour = strategies.index(protection.strategy) if len(strategies) > 1 else index
        colour %= len(_COLOURS)
        styles[protection.name] = _style(colour, used[colour])
        used[colour] += 1
    return styles


def _panels(report: SubjectReport, count: int, names: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Panels in one column, with space for a legend; a single note if there is nothing to show."""
    title = textwrap.fill(report.title, 42, break_long_words=True)
    rows = title.count("\n") + 2 + sum(_label(name).count("\n") + 1 for name in names)
    height = _PANEL * max(count, 1) + _ROW * rows
    # Some space between an axis label and the title of the next panel.
    layout = ConstrainedLayoutEngine(hspace=0.05, h_pad=0.06, w_pad=0.06)
    figure = Figure(figsize=(_WIDTH, height), layout=layout, dpi=180)
    figure.suptitle(_plain(title), weight="bold", fontsize="medium")
    grid = figure.subplots(max(count, 1), 1, squeeze=False, sharex=True, sharey=True)
    panels = list(grid.flat)
    for axis in panels:
        axis.spines[["top", "right"]].set_visible(False)
        # On every panel, since a phone shows one at a time.
        axis.tick_params(labelbottom=True, labelsize=_FONT["font.size"])
    if not count:
        panels[0].set_axis_off()
        panels[0].text(0.5, 0.5, "not measured", ha="center", transform=panels[0].transAxes)
    return figure, panels


def _curve(axis: Axes, rows: list[Best], place: dict[float, float], style: _Style) -> Any:
    rows = sorted((row for row in rows if row.recovered), key=lambda row: row.steps)
    x = [place[row.steps] for row in rows]
    # Infinite values cannot be drawn.
    metrics = [np.where(np.isfinite(row.recovered), row.recovered, np.nan) for row in rows]
    means = [row.mean() for row in metrics]
    (line,) = axis.plot(x, means, **style, markersize=5)
    low, high = [row.min() for row in metrics], [row.max() for row in metrics]
    axis.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    return line


def _intervals(axis: Axes, found: list[tuple[float, Any]], style: _Style) -> Any:
    means = np.array([each.mean for _, each in found], float)
    ends = np.array([[each.low, each.high] for _, each in found], float).reshape(-1, 2)
    # A bootstrap interval need not contain the mean, and no bar has a negative length.
    bars = np.maximum([means - ends[:, 0], ends[:, 1] - means], 0)
    x = [position for position, _ in found]
    return axis.errorbar(x, means, yerr=bars, **style, markersize=5, capsize=3)


def _on_log_axis(values: Iterable[float]) -> dict[float, float]:
    """Value → position on a log axis, where 0 is drawn to the left of the smallest value."""
    values = sorted(set(values))
    smallest = min((value for value in values if value > 0), default=1.0)
    return {value: value if value > 0 else smallest / 3 for value in values}


def _width(place: dict[float, float]) -> float:
    """The width of the axis, in factors of e; 1 if there are fewer than two values."""
    positions = place.values() or [1.0]
    return math.log(max(positions) / min(positions)) or 1.0


def _log_ticks(axis: Axes, place: dict[float, float], text: Callable[[float], str]) -> None:
    """A tick at each value, with a number where it fits."""
    axis.set_xscale("log")
    width = _width(place)
    low, high = min(place.values()), max(place.values())
    axis.set_xlim(low * math.exp(-0.08 * width), high * math.exp(0.08 * width))
    last, labels = -math.inf, []
    for value, x in place.items():
        room = math.log(x) - last > 0.11 * width
        last = math.log(x) if room else last
        labels.append(text(value) if room else "")
    axis.set_xticks(list(place.values()), labels)
    axis.minorticks_off()


def _legend(figure: Figure, handles: list[Any], names: Sequence[str]) -> None:
    if figure.legends:  # one for all panels
        return
    labels = [_plain(_label(name)) for name in names]
    columns = 2 if max(len(name) for name in names) <= 20 else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _label(name: str) -> str:
    return textwrap.fill(name, 44, break_long_words=True, max_lines=3, placeholder="…")


def _plain(text: str) -> str:
    """Escapes dollars (math mode) and a leading underscore (hidden before Matplotlib 3.10)."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text
