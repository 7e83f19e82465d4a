"""Plots that stages leave in `extras/`: one style, PNG, no display and no global matplotlib state.

No timestamps and no version in the file: the same data gives the same bytes with the same matplotlib.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from alignment_pipeline.progress import metric_series

_INCHES = (6.0, 3.5)
_WIDE_INCHES = (11.0, 4.0)
_DPI = 110
_BINS = 40
_PANEL_INCHES = 3.2
_CURVES = ("train/loss", "objective/score", "objective/kl", "reward/accuracy", "dpo/accuracy", "dpo/margin",
           "policy/entropy", "value/explained_variance")  # fmt: skip
_GREY = "#c9ced6"
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


def score_against_kl(path: Path, history: Sequence[Sequence[float]]) -> None:
    """Draw the way of a policy: score against KL (nats a response) at each update, later ones darker."""
    figure, axes = _figure("Score against distance from the reference", "KL, nats a response", "score")
    scores, kls = [score for score, _ in history], [kl for _, kl in history]
    axes.plot(kls, scores, color=_COLOURS[5], alpha=0.3, linewidth=1)
    points = axes.scatter(kls, scores, c=range(1, len(history) + 1), cmap="viridis_r", s=18, zorder=2)
    figure.colorbar(points, ax=axes, label="update")
    _save(figure, axes, path, legend=False)


def bars(path: Path, values: Mapping[str, tuple[float, float]], title: str, ylabel: str) -> None:
    """Draw a bar for each name from its value and the half width of its interval."""
    figure, axes = _figure(title, "", ylabel)
    heights, half_widths = [value for value, _ in values.values()], [width for _, width in values.values()]
    axes.bar(list(values), heights, yerr=half_widths, color=_colours(len(values)), width=0.6, capsize=4)
    _save(figure, axes, path, legend=False)


def reliability(path: Path, points: Sequence[tuple[float, float, int]], title: str) -> None:
    """Draw how often preferences are right against how sure of them a model is.

    Args:
        path: The PNG.
        points: (confidence, accuracy, pairs) of each bin; confidence from 1/2 to 1.
        title: Title.
    """
    figure, axes = _figure(title, "confidence, σ(|margin|)", "share that is right")
    axes.plot((0.5, 1), (0.5, 1), color=_GREY, linewidth=1.4, label="as sure as right")
    line = [(confidence, accuracy) for confidence, accuracy, _ in points]
    axes.plot(*zip(*line, strict=True), "o-", color=_COLOURS[0], linewidth=1.2, markersize=5, label="pairs, by bin")
    for confidence, accuracy, count in points:
        below = accuracy > 0.9
        axes.annotate(str(count), (confidence, accuracy), xytext=(0, -13 if below else 7), textcoords="offset points",
                      ha="center", fontsize=8, color=_COLOURS[5])  # fmt: skip
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(-0.03, 1.05)
    axes.legend(frameon=False, loc="lower right")
    _save(figure, axes, path, legend=False)


def bar_panels(
    path: Path, labels: Sequence[str], panels: Mapping[str, Sequence[tuple[float, float]]], title: str
) -> None:
    """Draw named rows of horizontal bars, a panel a measure, each bar from its value and its interval's half width."""
    figure = _canvas((2.2 + 2.0 * len(panels), 1.1 + 0.28 * len(labels)))
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    places = range(len(labels))
    for column, ((name, values), colour) in enumerate(zip(panels.items(), _colours(len(panels)), strict=True), 1):
        axes = figure.add_subplot(1, len(panels), column)
        _dress(axes, "", "", "")
        axes.set_title(name, fontsize=9, loc="left")
        half_widths = [width for _, width in values]
        axes.barh(
            places, [value for value, _ in values], xerr=half_widths if any(half_widths) else None,
            color=colour, height=0.65, capsize=2,
        )  # fmt: skip
        axes.set_yticks(places, labels if column == 1 else [""] * len(labels), fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def distributions(
    path: Path,
    labels: Sequence[str],
    filled: Mapping[str, Sequence[float]],
    marked: Mapping[str, Sequence[float]],
    title: str,
    xlabel: str,
    ylabel: str,
) -> None:
    """Draw distributions over named outcomes: wide bars within one another for some, marks on top for others."""
    figure = _canvas(_WIDE_INCHES)
    axes = figure.add_subplot()
    _dress(axes, title, xlabel, ylabel)
    places = range(len(labels))
    for (name, values), colour, width in zip(filled.items(), (_GREY, _COLOURS[0]), (0.9, 0.5), strict=True):
        axes.bar(places, values, label=name, color=colour, width=width)
    for (name, values), colour, mark in zip(marked.items(), _COLOURS[1:], "ox^", strict=False):
        axes.plot(places, values, mark, label=name, color=colour, markersize=4.5, fillstyle="none", markeredgewidth=1.3)
    axes.set_xticks(places, labels, rotation=90, fontsize=7, family="monospace")
    axes.set_xlim(-1, len(labels))
    axes.grid(visible=False, axis="x")
    _save(figure, axes, path, legend=True)


def below_a_curve(
    path: Path,
    curve: tuple[str, Sequence[tuple[float, float]]],
    ways: Mapping[str, Sequence[tuple[float, float]]],
    ends: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    xlabel: str,
    ylabel: str,
) -> None:
    """Draw a bounding curve, shaded above, ways that points take below it, and where several end.

    Args:
        path: The PNG.
        curve: Name and (x, y) points of the bound, x ascending.
        ways: Name → (x, y) points in order, joined.
        ends: Name → single points; the first series are open circles, the second crosses.
        title: Title.
        xlabel: What x is, with its unit.
        ylabel: What y is, with its unit.
    """
    figure, axes = _figure(title, xlabel, ylabel)
    name, bound = curve
    xs, ys = zip(*bound, strict=True)
    top = max(ys) + 0.12 * (max(ys) - min(ys))
    axes.fill_between(xs, ys, top, color=_GREY, alpha=0.45, linewidth=0, label="no policy can be here")
    axes.plot(xs, ys, color="black", linewidth=1.4, label=name)
    for (name, points), colour in zip(ways.items(), _colours(len(ways)), strict=True):
        axes.plot(*zip(*points, strict=True), ".-", color=colour, linewidth=0.9, markersize=4, label=name)
    for (name, points), mark in zip(ends.items(), ("o", "x"), strict=False):
        axes.plot(*zip(*points, strict=True), mark, color="black", markersize=8, fillstyle="none", label=name)
    reached = max(x for points in (*ways.values(), *ends.values()) for x, _ in points)
    axes.set_xlim(-0.02 * reached, 1.4 * reached)
    lowest = min(y for points in (bound, *ways.values(), *ends.values()) for _, y in points)
    highest = max(y for points in (*ways.values(), *ends.values()) for _, y in points)
    axes.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.25 * (highest - lowest))
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    _save(figure, axes, path, legend=False)


def spread_curves(path: Path, panels: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Draw curves of several seeds, one panel each: the seeds thin, their mean thick, one standard deviation around."""
    figure = _canvas((2 * _PANEL_INCHES * len(panels) / 1.4, _INCHES[1]))
    for column, ((title, runs), colour) in enumerate(zip(panels.items(), _colours(len(panels)), strict=True), 1):
        axes = figure.add_subplot(1, len(panels), column)
        _dress(axes, title, "update", "")
        steps = range(1, len(runs[0]) + 1)
        means = [mean(values) for values in zip(*runs, strict=True)]
        spreads = [stdev(values) if len(values) > 1 else 0.0 for values in zip(*runs, strict=True)]
        for run in runs:
            axes.plot(steps, run, color=colour, linewidth=0.7, alpha=0.4)
        low, high = zip(*((m - s, m + s) for m, s in zip(means, spreads, strict=True)), strict=True)
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, means, color=colour, linewidth=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def telling_curves(progress_log: Path) -> dict[str, list[tuple[int, float]]]:
    """The metrics of a progress log that say most, each as (step, value) in order; those logged once are left out."""
    series = metric_series(progress_log)
    lines = {
        name: [(step, metrics[name]) for (_, step), metrics in series.items() if name in metrics] for name in _CURVES
    }
    return {name: points for name, points in lines.items() if len(points) > 1}


def training_curves(path: Path, progress_log: Path) -> None:
    """Draw the telling metrics of a progress log side by side, one panel each; nothing if a stage logged no curve."""
    drawn = telling_curves(progress_log)
    if not drawn:
        return
    figure = _canvas((_PANEL_INCHES * len(drawn), _INCHES[1]))
    for column, ((name, points), colour) in enumerate(zip(drawn.items(), _colours(len(drawn)), strict=True), 1):
        axes = figure.add_subplot(1, len(drawn), column)
        _dress(axes, name, "step", "")
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _figure(title: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
    figure = _canvas(_INCHES)
    axes = figure.add_subplot()
    _dress(axes, title, xlabel, ylabel)
    return figure, axes


def _canvas(inches: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _dress(axes: Any, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _colours(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _save(figure: Any, axes: Any, path: Path, *, legend: bool) -> None:
    if legend:
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
