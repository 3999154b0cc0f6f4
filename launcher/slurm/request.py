"""What a job of a sweep asks of SLURM: what its plan needs, unless hydra.launcher says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.amounts import count
from launcher.config import RunConfig
from launcher.plan.topology import resolve_world_size
from launcher.slurm.needs import find_needs

# A run that is refused says why in seconds, in its own report, as in a sweep without SLURM.
REFUSED_MIN = 10
REFUSED_GIB = 4


@dataclass(frozen=True)
class Request:
    """Of one job; jobs with equal requests form an array."""

    num_cards: int
    num_cores: int
    memory_gib: float
    minutes: int

    def __str__(self) -> str:
        cards = count(self.num_cards, "card")
        return f"{cards}, {self.num_cores} cores, {self.memory_gib:g} GiB, {self.minutes} min"


def request_of(run: RunConfig | None, params: Mapping[str, Any]) -> Request:
    """The request of a run; None: of values that are no run, whose job says so.

    Args:
        params: hydra.launcher; what is null there comes from the plan.
    """
    found = refused(None)
    if run is not None:
        try:
            needs = find_needs(run, params["cards"])
            found = Request(needs.num_cards, needs.num_cores, needs.memory_gib, needs.minutes)
        except (ValueError, OSError):
            found = refused(run)
    return Request(
        num_cards=found.num_cards,
        num_cores=params["cpus_per_task"] or found.num_cores,
        memory_gib=params["mem_gb"] or found.memory_gib,
        minutes=params["timeout_min"] or found.minutes,
    )


def refused(run: RunConfig | None) -> Request:
    try:
        num_cards = 0 if run is None else resolve_world_size(run, None)
    except ValueError:
        num_cards = 0
    return Request(num_cards, 1, REFUSED_GIB, REFUSED_MIN)
