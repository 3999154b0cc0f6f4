"""What the plots of a sweep show, as numbers. Pure; nothing to show is an empty list."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from launcher.sweeps.rows import Row

# Overrides that choose the number of cards, and the one that chooses how many sequences are answered together.
CARD_KEYS = ("gpus", "topology")
BATCH_KEYS = ("workload.batch_size",)
# Overrides whose values are names that need no key beside them.
NAMES = ("model", "topology", "workload")


@dataclass(frozen=True)
class Point:
    """`low` and `high` are of the repeats, where a run had some; `y` is between them."""

    x: float
    y: float
    low: float
    high: float
    label: str = ""


@dataclass(frozen=True)
class Line:
    """One combination of the other overrides; `label` is empty where there are none."""

    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class MemoryBar:
    """The fullest card of a job, in GiB."""

    label: str
    predicted: float
    peak: float
    limit: float | None


def lines_over(rows: Sequence[Row], x: str, y: str, axis_keys: Sequence[str]) -> list[Line]:
    """`y` over `x`, a line for each combination of the overrides that vary beside `axis_keys`.

    Empty unless one line at least has values at two places.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row[x] is not None and row[y] is not None:
            groups[label_of(row, axis_keys)].append(row)
    lines = [
        Line(
            ", ".join(filter(None, (label, name))),
            tuple(point_of(row, x, y) for row in sorted(jobs, key=itemgetter(x))),
        )
        for label, group in groups.items()
        for name, jobs in by_topology(group, x).items()
    ]
    return lines if any(len({point.x for point in line.points}) > 1 for line in lines) else []


def by_topology(rows: Sequence[Row], x: str) -> dict[str, list[Row]]:
    """Those of a line, under no name. Where several topologies are at one `x`, a line for each by its name, to which
    belongs what has an `x` for itself, too."""
    at_x = Counter(row[x] for row in rows)
    topologies = dict.fromkeys(row["varies"].get("topology") for row in rows if at_x[row[x]] > 1)
    if len(topologies) < 2:
        return {"": list(rows)}
    return {
        override_text("topology", each): [
            row for row in rows if at_x[row[x]] == 1 or row["varies"].get("topology") == each
        ]
        for each in topologies
    }


def point_of(row: Row, x: str, y: str) -> Point:
    spread = row["spread"].get(y) or {}
    low, high = spread.get("min", row[y]), spread.get("max", row[y])
    return Point(row[x], row[y], min(low, row[y]), max(high, row[y]))


def label_of(row: Row, leave_out: Sequence[str] = ()) -> str:
    """The overrides of a job that vary, by the last words of their keys."""
    return ", ".join(override_text(key, value) for key, value in row["varies"].items() if key not in leave_out)


def override_text(key: str, value: str | None) -> str:
    if value is None:
        return f"{key} as it is"
    return value if key in NAMES else f"{key.rpartition('.')[2]}={value}"


def throughput_lines(rows: Sequence[Row]) -> list[Line]:
    """Tokens a second over the time of a token, a point for each batch size, with the batch as its label."""
    groups: dict[str, list[tuple[int, Point]]] = defaultdict(list)
    for row in rows:
        if None not in (row["batch_size"], row["tpot_p50_ms"], row["tokens_per_sec"]):
            point = point_of(row, "tpot_p50_ms", "tokens_per_sec")
            labelled = Point(point.x, point.y, point.low, point.high, str(row["batch_size"]))
            groups[label_of(row, BATCH_KEYS)].append((row["batch_size"], labelled))
    lines = [
        Line(label, tuple(point for _, point in sorted(points, key=lambda pair: pair[0])))
        for label, points in groups.items()
    ]
    batches = {batch for points in groups.values() for batch, _ in points}
    return lines if len(batches) > 1 else []


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """Points that no other beats in both, less time (x) and more tokens (y); by time."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def memory_bars(rows: Sequence[Row]) -> list[MemoryBar]:
    return [
        MemoryBar(label_of(row) or f"job {row['job']}", row["predicted_gib"], row["peak_gib"], row["limit_gib"])
        for row in rows
        if row["predicted_gib"] is not None and row["peak_gib"] is not None
    ]


def read_power(folder: Path, max_points: int = 400) -> dict[int, list[tuple[float, float]]]:
    """Seconds and watts of each card from a run's telemetry; empty where no power was measured."""
    curves: dict[int, list[tuple[float, float]]] = defaultdict(list)
    try:
        with (folder / "telemetry.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["power_w"]:
                    curves[int(row["index"])].append((float(row["time_sec"]), float(row["power_w"])))
    except (OSError, KeyError, ValueError, TypeError):
        # A file that was cut short shows what it has.
        pass
    return {index: thin(curve, max_points) for index, curve in sorted(curves.items())}


def thin(curve: Sequence[tuple[float, float]], max_points: int) -> list[tuple[float, float]]:
    """Means of as many neighbours as make `max_points` of a curve, or less."""
    size = -(-len(curve) // max_points)
    groups = (curve[start : start + size] for start in range(0, len(curve), size or 1))
    return [(sum(t for t, _ in group) / len(group), sum(w for _, w in group) / len(group)) for group in groups]
