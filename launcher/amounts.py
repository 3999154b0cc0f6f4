"""Numbers as tables show them."""

from __future__ import annotations

UNKNOWN = "-"


def number(value: float | None) -> str:
    """Three significant digits; a dash for what was not measured."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def amount(num_bytes: int | None, unit_bytes: int) -> str:
    return UNKNOWN if num_bytes is None else f"{num_bytes / unit_bytes:.2f}"


def percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share * 100:.1f} %"


def count(number: int, name: str) -> str:
    """As in "1 run" and "1,024 runs"."""
    return f"{number:,} {name}{'s' * (number != 1)}"
