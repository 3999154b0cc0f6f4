"""Times by which trees are chosen, measured as steps really run: before any request, on all ranks together."""

from __future__ import annotations

import statistics

import torch

from parallel.engine.engine import Engine
from parallel.engine.speculation.auto import AutoSpeculator
from parallel.engine.speculation.pass_timer import PlanCost, draft_rows, drafter_of
from parallel.engine.speculation.policy import Costs
from parallel.engine.speculation.tree_plan import PLAIN, TreePlan
from parallel.engine.step_timer import time_prepared

NUM_STEPS = 3
# Tokens of the sequences that steps are timed with, where max_context has them: a pass reads more weights than keys.
CONTEXT = 512

PlanCosts = dict[TreePlan, dict[int, PlanCost]]


def tune(engine: Engine) -> PlanCosts | None:
    """Lets an engine that chooses its trees begin to; returns the times of each plan for one sequence and for all.

    The first rank's times are everybody's, for all to choose alike. None where there is nothing to choose.
    """
    speculator = engine.speculator
    if not isinstance(speculator, AutoSpeculator):
        return None
    nums = sorted({1, engine.limits.batch_size})
    plans = (PLAIN, *speculator.trees)
    costs = {plan: {num: shared_cost(engine, speculator, plan, num) for num in nums} for plan in plans}
    speculator.policy.costs = {
        plan: Costs(tuple((num, cost.step_ms) for num, cost in by_num.items())) for plan, by_num in costs.items()
    }
    return costs


def shared_cost(engine: Engine, speculator: AutoSpeculator, plan: TreePlan, num_sequences: int) -> PlanCost:
    """Of the first rank; drafts by themselves, and the step itself, as the engine runs it."""
    contexts = [max(1, min(CONTEXT, engine.limits.max_context // 2))] * num_sequences
    timed, draft_ms = (engine, contexts, NUM_STEPS, engine.communicator), 0.0
    if drafter_of(engine, plan) is not None:
        draft_ms = statistics.median(time_prepared(*timed, draft_rows(engine, speculator.trees[plan])))
    speculator.plan = plan
    step_ms = statistics.median(time_prepared(*timed, engine.run_step, is_captured=True))
    speculator.plan = PLAIN
    own = torch.tensor([draft_ms, step_ms], dtype=torch.float64, device=engine.device)
    draft_ms, step_ms = engine.communicator.all_gather(own)[0].tolist()
    return PlanCost(max(0.0, step_ms - draft_ms), draft_ms, step_ms)
