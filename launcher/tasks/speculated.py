"""What speculation did in a run, and what its parts cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.config import SpeculationKind
from launcher.rank.context import RankContext
from launcher.tasks.loaded import LoadedModel
from parallel.engine.engine import Engine
from parallel.engine.speculation.acceptance import Acceptance
from parallel.engine.speculation.pass_timer import PlanCost
from parallel.engine.speculation.tree_plan import TreePlan
from parallel.engine.speculation.tune import PlanCosts
from parallel.engine.step_timer import time_drafts, time_steps


@dataclass(frozen=True)
class Steps:
    """Of one or more runs: drafts, the milliseconds of every step, and how many steps each tree was chosen for."""

    acceptance: Acceptance
    step_ms: Sequence[float]
    plans: Mapping[TreePlan, int]


def speculated(
    context: RankContext,
    loaded: LoadedModel,
    steps: Steps,
    contexts: Sequence[int],
    offload: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """How many drafts were accepted: of those of a sequence in a step, at the mean and as counts of 0, 1, ... of them;
    null without speculation.

    `num_drafts`: the most that can be, of a tree its depth; of a tree all nodes count as `drafted`. `passes_per_sec`
    are steps, with what was prefilled between them. `draft_ms` and `verify_ms`: see `costs`; `copy_ms`: in which plain
    copies would bring what a pass streams from host memory, while it computes. `choices`: see `choices`.

    Args:
        contexts: as of `communication`.
        offload: see `streaming`.
    """
    config = context.job.run.speculation
    if config.kind == SpeculationKind.none:
        return None
    mean, draft_load = steps.acceptance.accepted_per_step, loaded.draft_load
    return {
        "kind": config.kind.value,
        "num_drafts": config.longest,
        "tree": None if config.tree is None else asdict(config.tree),
        "drafted": steps.acceptance.drafted,
        "accepted": steps.acceptance.accepted,
        "accepted_per_step": mean,
        "tokens_per_pass": None if mean is None else 1 + mean,
        "passes_per_sec": 1e3 / statistics.mean(steps.step_ms) if steps.step_ms else None,
        "histogram": steps.acceptance.histogram(config.longest),
        **costs(context, loaded, steps.plans, contexts),
        "copy_ms": None if offload is None else offload["floor_ms"],
        "choices": None if loaded.tree_costs is None else choices(loaded.tree_costs, steps.plans),
        "load": None if draft_load is None else asdict(draft_load),
    }


def costs(
    context: RankContext, loaded: LoadedModel, plans: Mapping[TreePlan, int], contexts: Sequence[int]
) -> dict[str, float | None]:
    """Milliseconds of a step in which drafts are made, and of the rest, which checks them: timed by themselves, or of
    trees that were chosen the mean of what was measured before; null where that is not measured."""
    num_steps = context.job.run.engine.comm_share_steps
    if loaded.tree_costs is not None:
        return mean_costs(loaded.tree_costs, plans)
    if num_steps == 0:
        return {"draft_ms": None, "verify_ms": None}
    return timed_costs(context, loaded.engine, contexts[: loaded.engine.limits.batch_size], num_steps)


def timed_costs(
    context: RankContext, engine: Engine, contexts: Sequence[int], num_steps: int
) -> dict[str, float | None]:
    context.communicator.barrier()
    step_ms, draft_ms = (
        statistics.median(time(engine, contexts, num_steps, context.communicator)) for time in (time_steps, time_drafts)
    )
    return {"draft_ms": draft_ms, "verify_ms": max(0.0, step_ms - draft_ms)}


def mean_costs(tree_costs: PlanCosts, plans: Mapping[TreePlan, int]) -> dict[str, float | None]:
    """Of a step of all rows."""
    num_steps, all_rows = sum(plans.values()), {plan: by_num[max(by_num)] for plan, by_num in tree_costs.items()}
    if num_steps == 0:
        return {"draft_ms": None, "verify_ms": None}
    return {
        "draft_ms": sum(num * all_rows[plan].draft_ms for plan, num in plans.items()) / num_steps,
        "verify_ms": sum(num * rest_ms(all_rows[plan]) for plan, num in plans.items()) / num_steps,
    }


def rest_ms(cost: PlanCost) -> float:
    """Of a step, without what its drafts take by themselves."""
    return max(0.0, cost.step_ms - cost.draft_ms)


def choices(tree_costs: PlanCosts, plans: Mapping[TreePlan, int]) -> list[dict[str, Any]]:
    """Each tree, how many steps it was chosen for, and its measured milliseconds by number of sequences."""
    return [
        {**asdict(plan), "steps": plans.get(plan, 0), "costs": {str(num): asdict(cost) for num, cost in by_num.items()}}
        for plan, by_num in tree_costs.items()
    ]
