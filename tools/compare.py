"""Two runs, or two sweeps, side by side: python -m tools.compare A B [--json]

A and B are folders of runs, their report.json, or folders of sweeps. Jobs of sweeps are matched by the settings that
vary within either, typed or not. Ratios are B / A; a verdict stands only where both runs had repeats that tell their
spread.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.report.outcome import REPORT
from launcher.sweeps.jobs import SweepJob, find_jobs, read_overrides, read_report
from launcher.sweeps.rows import Row, job_row, split_overrides, varying_keys
from launcher.sweeps.table import VALUES

# Columns of the sweep's table -> whether more is better.
METRICS = {
    "tokens_per_sec": True,
    "ttft_ms": False,
    "tpot_p50_ms": False,
    "tpot_p99_ms": False,
    "comm_share": False,
    "peak_gib": False,
    "tokens_per_joule": True,
}


@dataclass(frozen=True)
class Pair:
    """The jobs of A and of B with the same values of the settings that vary; None where a side has none."""

    varies: dict[str, str | None]
    a: SweepJob | None
    b: SweepJob | None


def read_jobs(path: Path) -> tuple[SweepJob, ...]:
    """The jobs of a sweep, or a run as the only one.

    Raises:
        ValueError: neither is there.
    """
    folder = path.parent if path.name == REPORT else path
    report = read_report(folder)
    if report is not None:
        has_overrides = (folder / ".hydra" / "overrides.yaml").is_file()
        return (SweepJob(0, read_overrides(folder) if has_overrides else (), folder, report),)
    jobs = find_jobs(folder)
    if not jobs:
        raise ValueError(f"{path} holds neither a run (report.json) nor a sweep (a folder a job).")
    return jobs


def match_jobs(a: Sequence[SweepJob], b: Sequence[SweepJob]) -> list[Pair]:
    """Pairs in the order of A, then what only B has. A job that was run twice is matched in turn."""
    keys = list(dict.fromkeys(key for jobs in (a, b) for key in varying_keys([overrides_of(job) for job in jobs])))
    left: dict[tuple[str | None, ...], list[SweepJob]] = defaultdict(list)
    for job in b:
        left[values_of(job, keys)].append(job)
    pairs = []
    for job in a:
        found = left[values_of(job, keys)]
        pairs.append(Pair(dict(zip(keys, values_of(job, keys), strict=True)), job, found.pop(0) if found else None))
    rest = [job for jobs in left.values() for job in jobs]
    return pairs + [Pair(dict(zip(keys, values_of(job, keys), strict=True)), None, job) for job in rest]


def overrides_of(job: SweepJob) -> dict[str, str]:
    return split_overrides(job.overrides)


def values_of(job: SweepJob, keys: Sequence[str]) -> tuple[str | None, ...]:
    """As the job ran, whether they were typed or not; as typed where it has no such setting (model=NAME), or the report
    holds no config."""
    known, typed = config_of(job), overrides_of(job)
    return tuple(as_typed(known[key]) if key in known else typed.get(key) for key in keys)


def as_typed(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def compare_pair(pair: Pair) -> dict[str, Any]:
    """What one pair measured, as JSON has it; `ratio` is B / A, None where either is missing or A is zero."""
    a, b = (job_row(job) if job else None for job in (pair.a, pair.b))
    return {
        "overrides": pair.varies,
        "a": side(a),
        "b": side(b),
        "values": {name: compare_values(name, a or {}, b or {}) for name in METRICS},
    }


def side(row: Row | None) -> dict[str, Any] | None:
    return row and {key: row[key] for key in ("job", "status", "reason", "folder")}


def compare_values(name: str, a: Row, b: Row) -> dict[str, Any]:
    first, second = a.get(name), b.get(name)
    ratio = second / first if first and second is not None else None
    return {"a": first, "b": second, "ratio": ratio, "verdict": verdict(name, a, b)}


def verdict(name: str, a: Row, b: Row) -> str | None:
    """Of B: "better", "worse", or "within the spread" where the repeats of A and B overlap; None without repeats.

    A single one is its own lowest and highest, which tells nothing of the next.
    """
    first, second = ((row.get("spread") or {}).get(name) for row in (a, b))
    if any(spread is None or spread["min"] == spread["max"] for spread in (first, second)):
        return None
    if second["min"] <= first["max"] and first["min"] <= second["max"]:
        return "within the spread"
    return "better" if (second["min"] > first["max"]) == METRICS[name] else "worse"


def differences(pairs: Sequence[Pair]) -> dict[str, list[Any]]:
    """Settings and versions that differ between A and B in every matched pair: key -> [A's, B's].

    What varies within a sweep differs in no pair; reports that hold no config tell nothing of it.
    """
    both = [(config_of(pair.a), config_of(pair.b)) for pair in pairs]
    found = [
        {key: [a.get(key), b.get(key)] for key in {**a, **b} if a.get(key) != b.get(key)} for a, b in both if a and b
    ]
    first = found[0] if found else {}
    return {key: both for key, both in first.items() if all(each.get(key) == both for each in found)}


def config_of(job: SweepJob | None) -> dict[str, Any]:
    """Settings and versions of a job; empty where there is none, or it was refused before it had a config."""
    report = (job and job.report) or {}
    if not report.get("config"):
        return {}
    return dict(flat(report["config"])) | dict(flat(report.get("versions") or {}, "versions."))


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested dicts as pairs of dotted keys and values."""
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs


def comparison_table(compared: Sequence[dict[str, Any]]) -> Table:
    """A block of lines for each pair; values that neither side has are left out."""
    keys = list(compared[0]["overrides"])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in (*keys, ""):
        table.add_column(heading, overflow="fold")
    for heading in ("A", "B", "B / A"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for each in compared:
        lines = pair_lines(each)
        names = [value or "-" for value in each["overrides"].values()]
        for place, line in enumerate(lines):
            cells = (Text(cell) for cell in (*(names if place == 0 else [""] * len(names)), *line))
            table.add_row(*cells, end_section=place == len(lines) - 1)
    return table


def pair_lines(each: dict[str, Any]) -> list[tuple[str, ...]]:
    """Name, A, B, ratio and verdict of each value; the status where one did not end well."""
    statuses = [each[name]["status"] if each[name] else "not there" for name in ("a", "b")]
    lines: list[tuple[str, ...]] = [] if statuses == ["ok", "ok"] else [("status", *statuses, "", "")]
    for name, values in each["values"].items():
        if values["a"] is not None or values["b"] is not None:
            heading, text = VALUES[name]
            ratio = "-" if values["ratio"] is None else f"{values['ratio']:.3f}"
            lines.append((heading, text(values["a"]), text(values["b"]), ratio, values["verdict"] or ""))
    return lines or [("nothing measured", "-", "-", "-", "")]


def shown(value: Any) -> str:
    """On one line, whatever it holds."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and "\n" in value else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.compare", description=__doc__)
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, no table")
    options = parser.parse_args(arguments)
    try:
        pairs = match_jobs(read_jobs(options.a), read_jobs(options.b))
    except ValueError as error:
        parser.error(str(error))
    compared, differ = [compare_pair(pair) for pair in pairs], differences(pairs)
    if options.json:
        print(json.dumps({"a": str(options.a), "b": str(options.b), "differences": differ, "jobs": compared}))
        return 0
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(f"A: {options.a}\nB: {options.b}", markup=False, highlight=False, soft_wrap=True)
    for key, (first, second) in differ.items():
        line = f"{key}: {shown(first)} in A, {shown(second)} in B"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(comparison_table(compared))
    return 0


if __name__ == "__main__":
    sys.exit(main())
