"""What cards draw, from their energy while a calibration keeps them at one thing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from launcher.timing.rates import PowerDraw

STEPS, PASSES, WAITING = "steps", "passes", "waiting"
# Left out at either end of a load: energy is sampled some times a second, and in proportion between samples.
MARGIN_SEC = 0.3

# (start, end) in seconds since 1970 -> joules of all cards; None where they are not known.
EnergyBetween = Callable[[float, float], float | None]


@dataclass(frozen=True)
class Load:
    """What cards did from `start` to `end` (seconds since 1970) with a model of this format; `rows`, of steps."""

    format: str
    kind: str
    start: float
    end: float
    rows: int = 0


def find_power_draws(loads: Iterable[Load], energy_between: EnergyBetween, num_cards: int) -> dict[str, PowerDraw]:
    """By format; without those of which something is not known."""
    by_format: dict[str, list[Load]] = {}
    for load in loads:
        by_format.setdefault(load.format, []).append(load)
    found = {name: find_power_draw(each, energy_between, num_cards) for name, each in by_format.items()}
    return {name: draw for name, draw in found.items() if draw is not None}


def find_power_draw(loads: Iterable[Load], energy_between: EnergyBetween, num_cards: int) -> PowerDraw | None:
    """Of the loads of one format: steps of some numbers of rows, passes, and waiting."""
    watts: dict[tuple[str, int], float] = {}
    for load in loads:
        start, end = load.start + MARGIN_SEC, load.end - MARGIN_SEC
        joules = energy_between(start, end) if start < end else None
        if joules is None:
            return None
        watts[load.kind, load.rows] = joules / (end - start) / num_cards
    steps = {rows: each for (kind, rows), each in watts.items() if kind == STEPS}
    return PowerDraw(steps, watts[PASSES, 0], watts[WAITING, 0])
