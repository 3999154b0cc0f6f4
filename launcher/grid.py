"""The workloads of task=predictions: with the plan and the times of each. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.config import RunConfig
from launcher.plan import Plan
from launcher.timing.predict import Times


@dataclass(frozen=True)
class GridPoint:
    """A workload; `plan` is None, and `skipped` says why, where it is not measured. `times` as Job's."""

    batch_size: int
    prompt_tokens: int
    plan: Plan | None = None
    times: Times | str | None = None
    skipped: str | None = None


def point_run(run: RunConfig, point: GridPoint) -> RunConfig:
    """`run` with that workload."""
    workload = replace(run.workload, batch_size=point.batch_size, prompt_tokens=point.prompt_tokens)
    return replace(run, workload=workload)


def largest_plan(points: tuple[GridPoint, ...]) -> Plan:
    """Of the point that takes most memory."""
    plans = [point.plan for point in points if point.plan is not None]
    return max(plans, key=lambda plan: max(card.predicted_bytes for card in plan.cards))
