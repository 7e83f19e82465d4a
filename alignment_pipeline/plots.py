"""Plots that stages leave in `extras/`: one style, PNG, no display and no global matplotlib state.

No timestamps and no version in the file: the same data gives the same bytes with the same matplotlib.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_INCHES = (6.0, 3.5)
_DPI = 110
_BINS = 40
_COLOURS = ("#3b6fb6", "#d9822b", "#3f9a6d", "#a8518a", "#8a7a3d", "#5c6470")


def histogram(path: Path, series: Mapping[str, Sequence[float]], title: str, xlabel: str) -> None:
    """Draw the distributions of several series over common bins."""
    figure, axes = _figure(title, xlabel, "rows")
    everything = [value for values in series.values() for value in values]
    span = (min(everything), max(everything)) if everything else (0.0, 1.0)
    for (name, values), colour in zip(series.items(), _colours(len(series)), strict=True):
        axes.hist(values, bins=_BINS, range=span, label=name, color=colour, alpha=0.6)
    _save(figure, axes, path, legend=bool(series))


def curves(
    path: Path, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, xlabel: str, ylabel: str
) -> None:
    """Draw lines, each given as its x values and its y values."""
    figure, axes = _figure(title, xlabel, ylabel)
    for (name, (xs, ys)), colour in zip(series.items(), _colours(len(series)), strict=True):
        axes.plot(xs, ys, label=name, color=colour, linewidth=1.6, marker="o" if len(xs) < 2 else None)
    _save(figure, axes, path, legend=bool(series))


def bars(path: Path, values: Mapping[str, tuple[float, float]], title: str, ylabel: str) -> None:
    """Draw a bar for each name from its value and the half width of its interval."""
    figure, axes = _figure(title, "", ylabel)
    heights, half_widths = [value for value, _ in values.values()], [width for _, width in values.values()]
    axes.bar(list(values), heights, yerr=half_widths, color=_colours(len(values)), width=0.6, capsize=4)
    _save(figure, axes, path, legend=False)


def _figure(title: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colours(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _save(figure: Any, axes: Any, path: Path, *, legend: bool) -> None:
    if legend:
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
