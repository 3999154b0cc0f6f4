"""The workloads of task=predictions, each planned as a run of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.config import RunConfig
from launcher.hardware.inventory import Inventory
from launcher.models.shape import ModelShape
from launcher.plan.plan import Plan
from launcher.plan.timed import plan_timed
from launcher.plan.topology import Placement, PlanError
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


def plan_grid(run: RunConfig, placement: Placement, shape: ModelShape, inventory: Inventory) -> tuple[GridPoint, ...]:
    """Every batch size with every length of prompt.

    Raises:
        PlanError: no point can be run; the reason of the first.
    """
    grid = run.predictions
    points = tuple(
        plan_point(run, GridPoint(batch_size, prompt_tokens), placement, shape, inventory)
        for batch_size in grid.batch_sizes
        for prompt_tokens in grid.prompt_tokens
    )
    if all(point.plan is None for point in points):
        raise PlanError(f"no workload of the grid can be run. {points[0].skipped}")
    return points


def plan_point(
    run: RunConfig, point: GridPoint, placement: Placement, shape: ModelShape, inventory: Inventory
) -> GridPoint:
    """`point` with its plan and times, or with the reason to skip it."""
    own = point_run(run, point)
    try:
        plan, times = plan_timed(own, placement, shape, inventory)
    except PlanError as error:
        return replace(point, skipped=error.summary)
    if plan.offload is not None:
        return replace(point, skipped="layers would be streamed from host memory. Use task=bench for this workload.")
    return replace(point, plan=plan, times=times)
