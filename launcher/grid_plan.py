"""Plans the workloads of task=predictions, each as a run of its own. No torch."""

from __future__ import annotations

from dataclasses import replace

from launcher.config import RunConfig
from launcher.grid import GridPoint, point_run
from launcher.hardware import Inventory
from launcher.shape import ModelShape
from launcher.timing.find import plan_timed
from launcher.topology import Placement, PlanError


def plan_grid(run: RunConfig, placement: Placement, shape: ModelShape, inventory: Inventory) -> tuple[GridPoint, ...]:
    """Raises:
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
        return replace(point, skipped=str(error).splitlines()[0])
    if plan.offload is not None:
        return replace(point, skipped="layers would be streamed from host memory. Use task=bench for this workload.")
    return replace(point, plan=plan, times=times)
