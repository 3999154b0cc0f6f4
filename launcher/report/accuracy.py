"""How far predicted times are from measured ones: rows of numbers, their errors, and what they come to."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from launcher.plan.grid import GridPoint
from launcher.timing.predict import Times

# What is compared, and how far it may be off.
DECODE, PREFILL = 0.10, 0.15
LIMITS = {"step_ms": DECODE, "itl_ms": DECODE, "ttft_ms": PREFILL, "prefill_tokens_per_sec": PREFILL}
Row = dict[str, Any]
# In the run folder: a line a point, and all of them to be read.
POINTS_FILE = "predictions.jsonl"
PAGE_FILE = "predictions.md"


def point_row(point: GridPoint, output_tokens: int, measured: Row | None) -> Row:
    """What is written of a point; `measured` is None where it was skipped."""
    times = point.times
    predicted = predicted_row(times) if isinstance(times, Times) else None
    if predicted is not None and point.plan is not None:
        predicted["tpot_floor_ms"] = point.plan.tpot_floor_ms
    return {
        "batch_size": point.batch_size,
        "prompt_tokens": point.prompt_tokens,
        "output_tokens": output_tokens,
        "skipped": point.skipped,
        "measured": measured,
        "predicted": predicted,
        "no_times_because": times if isinstance(times, str) else None,
        "error": compare(measured or {}, predicted),
    }


def predicted_row(times: Times) -> Row:
    """`step_ms` is a step of all sequences, `itl_ms` the median of what tokens wait, with prompts read between them."""
    return asdict(times) | {"step_ms": times.tpot_ms}


def compare(measured: Row, predicted: Row | None) -> dict[str, float | None]:
    """Predicted over measured, less 1; None where either is missing."""
    return {name: _error(measured.get(name), (predicted or {}).get(name)) for name in LIMITS}


def _error(measured: float | None, predicted: float | None) -> float | None:
    return None if not measured or predicted is None else predicted / measured - 1


def summarise_errors(rows: Iterable[Row]) -> dict[str, Row]:
    """Of each quantity: points compared, how many are within the limit, the worst error and the median of sizes."""
    measured = [row["error"] for row in rows if row["skipped"] is None]
    return {name: _summary([each[name] for each in measured], limit) for name, limit in LIMITS.items()}


def _summary(found: Sequence[float | None], limit: float) -> Row:
    errors = [error for error in found if error is not None]
    return {
        "limit": limit,
        "points": len(errors),
        "within": sum(abs(error) <= limit for error in errors),
        "worst": max(errors, key=abs, default=None),
        "median": statistics.median(map(abs, errors)) if errors else None,
    }
