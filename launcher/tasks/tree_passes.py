"""What passes over trees of several sizes take, and what they would give at a chance that the user names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.rank.context import RankContext
from launcher.tasks.offload import link_bytes
from parallel.engine.engine import Engine
from parallel.engine.speculation.pass_timer import PlanCost, time_plan
from parallel.engine.speculation.tree_plan import TreePlan


def time_tree_passes(
    context: RankContext, engine: Engine, contexts: Sequence[int], copy_bytes_per_sec: float | None
) -> list[dict[str, Any]] | None:
    """A row for each of bench.tree_sizes, of sequences with `contexts` tokens; None without any.

    Args:
        copy_bytes_per_sec: of plain copies from pinned memory, where layers are streamed from it; None on a CPU.
    """
    run = context.job.run
    if not run.bench.tree_sizes:
        return None
    rows, num_steps = [], max(1, run.engine.comm_share_steps)
    for plan in run.timed_trees:
        context.communicator.barrier()
        cost = time_plan(engine, plan, contexts, num_steps, context.communicator)
        num_bytes = link_bytes(engine, plan.size * len(contexts), sum(contexts))
        link = over_the_link(num_bytes, cost.pass_ms, copy_bytes_per_sec)
        rows.append(pass_row(plan, cost) | link | assumed(plan, cost, len(contexts), run.bench.acceptance))
        context.events.progress("timing passes", len(rows), len(run.timed_trees), "sizes")
    return rows


def pass_row(plan: TreePlan, cost: PlanCost) -> dict[str, Any]:
    """`passes_per_sec`: of steps, with the draft model's passes before each."""
    return {
        "tree_size": plan.size,
        "depth": plan.depth,
        "pass_ms": cost.pass_ms,
        "draft_ms": cost.draft_ms,
        "step_ms": cost.step_ms,
        "passes_per_sec": 1e3 / cost.step_ms,
    }


def over_the_link(num_bytes: int, pass_ms: float, copy_bytes_per_sec: float | None) -> dict[str, Any]:
    """What a pass copies from host memory (0: nothing), and the time in which a plain copy would, over that of the
    pass."""
    floor_ms = num_bytes / copy_bytes_per_sec * 1e3 if num_bytes and copy_bytes_per_sec else None
    return {
        "link_bytes": num_bytes,
        "link_floor_ms": floor_ms,
        "share_of_floor": None if floor_ms is None else floor_ms / pass_ms,
    }


def assumed(plan: TreePlan, cost: PlanCost, num_sequences: int, acceptance: float | None) -> dict[str, Any]:
    """Nothing of this is measured but times: at each depth a draft comes true with the chance `acceptance`."""
    tokens = None if acceptance is None else sum(acceptance**depth for depth in range(plan.depth + 1))
    return {
        "assumed": {
            "acceptance": acceptance,
            "tokens_per_pass": tokens,
            "tokens_per_sec": None if tokens is None else tokens * num_sequences / cost.step_ms * 1e3,
        }
    }
