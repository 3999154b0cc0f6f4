"""What is said of many measured times."""

from __future__ import annotations

from collections.abc import Sequence


def p99(times: Sequence[float]) -> float:
    """The time that one in a hundred exceeds; of fewer than a hundred, the longest."""
    return sorted(times)[len(times) - len(times) // 100 - 1]
