"""Predicted against measured, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.amounts import UNKNOWN, number
from launcher.report.accuracy import summarise_errors

Row = dict[str, Any]
NAMES = {
    "step_ms": "decode step, ms",
    "itl_ms": "ms a token",
    "ttft_ms": "first token, ms",
    "prefill_tokens_per_sec": "prefill tokens/s",
}


def accuracy_page(title: str, rows: Sequence[Row]) -> str:
    """Tables of all points, of what was skipped, and what the errors come to."""
    parts = [title, points_table([row for row in rows if row["skipped"] is None]), summary_text(rows)]
    parts += skipped_lines(rows)
    return "\n\n".join(part for part in parts if part) + "\n"


def points_table(rows: Sequence[Row]) -> str:
    """Cells are measured, predicted, error."""
    columns = ["batch", "prompt", *NAMES.values(), "floor, ms", "held by"]
    lines = [columns, ["--:"] * (len(columns) - 1) + ["---"]]
    lines += [
        [str(row["batch_size"]), str(row["prompt_tokens"]), *(_cell(row, name) for name in NAMES), *_bound(row)]
        for row in rows
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(row: Row, name: str) -> str:
    measured, predicted = row["measured"][name], (row["predicted"] or {}).get(name)
    return f"{number(measured)}, {number(predicted)}, {percent_of(row['error'][name])}"


def _bound(row: Row) -> list[str]:
    predicted = row["predicted"] or {}
    # Rows of before have a floor at the speed of a copy.
    floor_ms = predicted.get("tpot_floor_ms", predicted.get("floor_ms"))
    return [number(floor_ms), predicted.get("limit") or row["no_times_because"] or UNKNOWN]


def percent_of(error: float | None) -> str:
    return UNKNOWN if error is None else f"{error:+.1%}"


def summary_text(rows: Sequence[Row]) -> str:
    return "Cells are measured, predicted, error.\n\n" + "\n".join(
        f"- {NAMES[name]}: {each['within']} of {each['points']} within {each['limit']:.0%}, "
        f"worst {percent_of(each['worst'])}, median {_median(each['median'])}"
        for name, each in summarise_errors(rows).items()
    )


def _median(error: float | None) -> str:
    return UNKNOWN if error is None else f"{error:.1%}"


def skipped_lines(rows: Sequence[Row]) -> list[str]:
    lines = [
        f"- batch {row['batch_size']}, prompts of {row['prompt_tokens']}: {row['skipped']}"
        for row in rows
        if row["skipped"] is not None
    ]
    return ["Not measured:", "\n".join(lines)] if lines else []
