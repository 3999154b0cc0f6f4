"""What is said of many measured times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def p99(times: Sequence[float]) -> float:
    """The time that one in a hundred exceeds; of fewer than a hundred, the longest."""
    return sorted(times)[len(times) - len(times) // 100 - 1]


def p50_p99(times: Sequence[float]) -> dict[str, float | None]:
    """Both; null where there are no times."""
    return {"p50": statistics.median(times) if times else None, "p99": p99(times) if times else None}
