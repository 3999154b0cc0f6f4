"""Plots over the jobs of a sweep, each as PNG and SVG; one with nothing to show is not written.

The colours are Okabe and Ito's, which differ for every kind of colour vision; markers differ too. matplotlib takes a
second to import, so only the end of a sweep imports this.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from launcher.sweeps.jobs import SweepJob
from launcher.sweeps.rows import OK, Row, without_common_folders
from launcher.sweeps.series import (
    CARD_KEYS,
    Line,
    MemoryBar,
    label_of,
    lines_over,
    memory_bars,
    pareto_front,
    read_power,
    throughput_lines,
)

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
QUIET, FRONT = "#6b6b6b", "#c9c9c9"
MEASURED_KEY = Line2D([], [], color=QUIET, marker="o", label="measured")
PREDICTED_KEY = Line2D([], [], color=QUIET, linestyle="--", marker="o", markerfacecolor="white", label="predicted")
# Seen around the markers, where the front is a single point, too.
FRONT_SIZE = 17
FRONT_KEY = Line2D([], [], color=FRONT, linewidth=7, label="Pareto front")
STYLE: Any = {
    # Text stays text, so that an SVG can be searched and scales with its fonts.
    "svg.fonttype": "none",
    "svg.hashsalt": "launch70b",
    # A prompt with two dollar signs is no formula.
    "text.parse_math": False,
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 8,
}
DPI = 150
WIDTH, HEIGHT, LEGEND_ROW = 8.0, 4.6, 0.3
# Of a label of the memory's plot.
BAR_LINE = 0.21
# Characters of a label in a line: one of two columns of a legend, or its only one; beside an axis or above a panel.
LEGEND_LABEL, LONG_LABEL, MAX_LABEL = 28, 60, 34
# Of the largest value, what an axis of memory spans at least: a difference of two percent must not fill it.
MIN_SPAN = 0.25
MAX_PANELS = 24
PANEL_COLUMNS = 3


def write_plots(jobs: Sequence[SweepJob], rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws what the jobs that went well have to show; returns the files.

    Raises:
        OSError: the folder cannot be written.
    """
    done = [row for row in without_common_folders(rows) if row["status"] == OK]
    with matplotlib.rc_context(STYLE):
        figures = {name: draw(done) for name, draw in PLOTS.items()}
        figures["power_over_time"] = draw_power(jobs, done)
        return [path for name, figure in figures.items() if figure for path in save_figure(figure, folder, name)]


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        # The date would make every file a new one.
        figure.savefig(path, dpi=DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def over_cards(y: str, title: str, label: str, scale: float = 1.0) -> Callable[[Sequence[Row]], Figure | None]:
    """A plot of one value over the number of cards: measured, and predicted where the plan could tell."""

    def draw(rows: Sequence[Row]) -> Figure | None:
        measured = lines_over(rows, "world_size", y, CARD_KEYS)
        predicted = lines_over(rows, "world_size", f"predicted_{y}", CARD_KEYS)
        if not measured and not predicted:
            return None
        figure, axes = new_figure(title, "cards", label)
        labels = list(dict.fromkeys(line.label for line in (*measured, *predicted)))
        for line in measured:
            draw_line(axes, line, labels.index(line.label), scale)
        for line in predicted:
            draw_predicted(axes, line, labels.index(line.label), scale)
        axes.set_xticks(sorted({point.x for line in (*measured, *predicted) for point in line.points}))
        axes.set_ylim(bottom=0)
        handles = [key_of(label, place) for place, label in enumerate(labels) if label]
        kinds = [PREDICTED_KEY] if predicted else []
        add_legend(figure, [*handles, *([MEASURED_KEY] if measured and predicted else []), *kinds])
        return figure

    return draw


def draw_line(axes: Axes, line: Line, place: int, scale: float = 1.0) -> None:
    """A line with a bar from the lowest to the highest of the repeats at each point."""
    xs = [point.x for point in line.points]
    ys = [point.y * scale for point in line.points]
    errors = [[(p.y - p.low) * scale for p in line.points], [(p.high - p.y) * scale for p in line.points]]
    axes.errorbar(xs, ys, yerr=errors, color=color(place), marker=marker(place), capsize=4)


def draw_predicted(axes: Axes, line: Line, place: int, scale: float) -> None:
    xs, ys = [point.x for point in line.points], [point.y * scale for point in line.points]
    axes.plot(xs, ys, color=color(place), linestyle="--", linewidth=1.5, marker=marker(place), markerfacecolor="white")


def draw_throughput(rows: Sequence[Row]) -> Figure | None:
    """Throughput against latency over batch, and the front that no job beats."""
    lines = throughput_lines(rows)
    if not lines:
        return None
    title = "Throughput against latency; numbers are batch sizes"
    figure, axes = new_figure(title, "time per output token, p50 (ms)", "tokens/s, prefill included")
    front = pareto_front(point for line in lines for point in line.points)
    axes.plot(
        [point.x for point in front], [point.y for point in front],
        color=FRONT, linewidth=7, solid_capstyle="round", marker="o", markersize=FRONT_SIZE, zorder=1,
    )  # fmt: skip
    for place, line in enumerate(lines):
        draw_line(axes, line, place)
        # Among many lines only those of the front can be read.
        for point in [point for point in line.points if len(lines) <= len(COLORS) or point in front]:
            axes.annotate(
                point.label, (point.x, point.y), (10, -7), textcoords="offset points", fontsize=11, color=color(place)
            )
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    keys = [key_of(line.label, place) for place, line in enumerate(lines) if line.label]
    add_legend(figure, [*keys, FRONT_KEY])
    return figure


def draw_memory(rows: Sequence[Row]) -> Figure | None:
    """Predicted and measured memory of each job, on one line each."""
    bars = memory_bars(rows)
    if not bars:
        return None
    labels = [wrap(bar.label) for bar in bars]
    most_lines = max(label.count("\n") + 1 for label in labels)
    figure = Figure(figsize=(WIDTH, 1.9 + BAR_LINE * max(most_lines, 2) * len(bars)), layout="constrained")
    axes = figure.subplots()
    figure.suptitle("Memory of the fullest card", x=0.01, ha="left", fontsize=14)
    axes.set_xlabel("GiB")
    places, peaks, predictions = range(len(bars)), [bar.peak for bar in bars], [bar.predicted for bar in bars]
    axes.hlines(places, peaks, predictions, color=QUIET, linewidth=2, zorder=1)
    axes.scatter(predictions, places, s=95, facecolors="white", edgecolors=COLORS[0], linewidths=2, label="predicted")
    axes.scatter(peaks, places, s=60, marker="D", color=COLORS[1], label="measured peak", zorder=3)
    axes.text(1.02, 1.01, "difference", transform=axes.transAxes, va="bottom", fontsize=11)
    for place, bar in enumerate(bars):
        # A zero has no sign of its own: less than nothing is plus nothing.
        text = f"{round((bar.peak / bar.predicted - 1) * 100, 1) + 0.0:+.1f} %"
        axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=11)
    draw_limit(axes, bars)
    axes.set_yticks(places, labels, fontsize=11)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.margins(x=0.1)
    widen(axes)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def widen(axes: Axes) -> None:
    """The axis of values, to both sides, where these are close together."""
    low, high = axes.get_xlim()
    short = MIN_SPAN * high - (high - low)
    if short > 0:
        axes.set_xlim(low - short / 2, high + short / 2)


def draw_limit(axes: Axes, bars: Sequence[MemoryBar]) -> None:
    """A line at limits.card_memory_gib, where all jobs had the same."""
    limits = {bar.limit for bar in bars}
    if len(limits) == 1 and None not in limits:
        axes.axvline(max(limit or 0.0 for limit in limits), color=QUIET, linestyle="--", label="limit of a card")


def draw_power(jobs: Sequence[SweepJob], rows: Sequence[Row]) -> Figure | None:
    """Watts of each card over time, a panel a job, all to the same scale of watts."""
    folders = {job.number: job.folder for job in jobs}
    found = [(row, read_power(folder)) for row in rows if (folder := folders[row["job"]])]
    panels = [(row, curves) for row, curves in found if curves]
    if not panels:
        return None
    shown = panels[:MAX_PANELS]
    columns = min(PANEL_COLUMNS, len(shown))
    num_rows = -(-len(shown) // columns)
    figure = Figure(figsize=(max(WIDTH, 4.2 * columns), 1.4 + 2.5 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, columns, sharey=True, squeeze=False)
    for axes, (row, curves) in zip(grid.flat, shown, strict=False):
        draw_curves(axes, wrap(label_of(row) or f"job {row['job']}"), curves)
    grid[0, 0].set_ylim(0, 1.05 * max(watts for _, curves in shown for curve in curves.values() for _, watts in curve))
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    left_out = f", {len(shown)} of {len(panels)} jobs" if len(shown) < len(panels) else ""
    figure.suptitle(f"Power of each card over time{left_out}", x=0.01, ha="left", fontsize=15)
    figure.supxlabel("seconds since the start of the job", fontsize=13)
    figure.supylabel("power (W)", fontsize=13)
    indices = sorted({index for _, curves in shown for index in curves})
    handles = [Line2D([], [], color=color(index), label=f"card {index}") for index in indices]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
    return figure


def draw_curves(axes: Axes, title: str, curves: dict[int, list[tuple[float, float]]]) -> None:
    axes.set_title(title, fontsize=12)
    for index, curve in curves.items():
        axes.plot([sec for sec, _ in curve], [watts for _, watts in curve], color=color(index), linewidth=1.6)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def new_figure(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def add_legend(figure: Figure, keys: Sequence[Line2D]) -> None:
    """Below the plot, where it hides nothing and takes no height from it."""
    if not keys:
        return
    labels = [str(key.get_label()) for key in keys]
    columns = 1 if max(map(len, labels)) > LEGEND_LABEL else 2
    num_lines = sum(label.count("\n") + 1 for label in labels)
    figure.set_figheight(HEIGHT + LEGEND_ROW * -(-num_lines // columns))
    figure.legend(handles=keys, loc="outside lower center", ncols=columns)


def key_of(label: str, place: int) -> Line2D:
    """A line of the legend."""
    return Line2D([], [], color=color(place), marker=marker(place), label=wrap(label, LONG_LABEL))


def wrap(label: str, width: int = MAX_LABEL) -> str:
    return "\n".join(textwrap.wrap(label, width))


def color(place: int) -> str:
    return COLORS[place % len(COLORS)]


def marker(place: int) -> str:
    """Another one when the colours begin again."""
    return MARKERS[(place + place // len(COLORS)) % len(MARKERS)]


PLOTS: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
    "tokens_per_sec_over_cards": over_cards("tokens_per_sec", "Throughput over cards", "tokens/s, prefill included"),
    "ttft_over_cards": over_cards("ttft_ms", "Time to first token over cards", "TTFT (ms)"),
    "comm_share_over_cards": over_cards(
        "comm_share", "Share of communication in a decode step", "share of the step (%)", scale=100.0
    ),
    "memory": draw_memory,
    "throughput_against_latency": draw_throughput,
}
