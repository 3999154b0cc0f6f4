"""Times by which trees are chosen, measured as steps really run: before any request, on all ranks together."""

from __future__ import annotations

from dataclasses import astuple

import torch

from parallel.engine.engine import Engine
from parallel.engine.speculation.auto import AutoSpeculator
from parallel.engine.speculation.pass_timer import PlanCost, time_plan
from parallel.engine.speculation.policy import Costs
from parallel.engine.speculation.tree_plan import PLAIN, TreePlan

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
    costs = {plan: {num: shared_cost(engine, plan, num) for num in nums} for plan in (PLAIN, *speculator.trees)}
    speculator.policy.costs = {
        plan: Costs(tuple((num, cost.step_ms) for num, cost in by_num.items())) for plan, by_num in costs.items()
    }
    return costs


def shared_cost(engine: Engine, plan: TreePlan, num_sequences: int) -> PlanCost:
    """Of the first rank."""
    context = max(1, min(CONTEXT, engine.limits.max_context // 2))
    cost = time_plan(engine, plan, [context] * num_sequences, NUM_STEPS, engine.communicator)
    own = torch.tensor(astuple(cost), dtype=torch.float64, device=engine.device)
    return PlanCost(*engine.communicator.all_gather(own)[0].tolist())
