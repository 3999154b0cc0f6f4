"""Up to how many rows a run multiplies by packed weights, chosen before they are loaded."""

from __future__ import annotations

from dataclasses import replace

from launcher.models.shape import ModelShape
from launcher.rank.context import RankContext
from parallel.footprint import OWN_KERNELS, predict_kernel
from parallel.partition import split_by_grain
from parallel.product_trial import FusedRows, measure_fused_rows


def choose_fused_rows(context: RankContext) -> FusedRows | None:
    """For all models of the job, by the first whose linears have a choice; None where none has."""
    job = context.job
    assert job.plan is not None and job.shape is not None, "the parent plans a model for this task"
    models = [(job.shape, job.plan.grain)]
    if job.draft is not None:
        assert job.plan.draft_grain is not None, "a plan with a draft model deals it over the ranks"
        models.append((job.draft.shape, job.plan.draft_grain))
    found = (fused_rows_of(context, shape, grain, job.plan.dtype) for shape, grain in models)
    return next((each for each in found if each is not None), None)


def fused_rows_of(context: RankContext, shape: ModelShape, grain: int, dtype: str) -> FusedRows | None:
    """As engine.fused_prefill_rows says, or by a trial of gate and up, the largest linear, but not below what the plan
    counts on; None without a choice."""
    scheme, asked = shape.scheme, context.job.run.engine.fused_prefill_rows
    if scheme is None or predict_kernel(scheme, context.device.type, dtype) not in OWN_KERNELS:
        return None
    if asked is not None:
        return FusedRows(asked, f"engine.fused_prefill_rows={asked} was asked for")
    # The same on all ranks: those of the one that has most.
    intermediate = max(split_by_grain(shape.intermediate_size, context.communicator.world_size, grain))
    found = measure_fused_rows(scheme, 2 * intermediate, shape.hidden_size, context.communicator, context.device)
    plan = context.job.plan
    return found if plan is None else at_least(found, plan.fused_rows)


def at_least(found: FusedRows, planned: int) -> FusedRows:
    """`found` with as many rows as the plan counts on: there is no memory for dequantised weights up to these."""
    if found.limit >= planned:
        return found
    return replace(found, limit=planned, reason=f"{planned} rows, as planned for such cards; {found.reason}")
