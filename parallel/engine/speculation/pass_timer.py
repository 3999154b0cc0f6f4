"""What a pass over trees of one size takes, and what growing them does, whichever trees an engine has."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.engine.engine import Engine
from parallel.engine.rows import Rows
from parallel.engine.speculation.draft_graphs import DraftGraphs
from parallel.engine.speculation.drafter import HistoryDrafter, ModelDrafter
from parallel.engine.speculation.token_tree import ROOT, TokenTree, choose_nodes
from parallel.engine.speculation.tree_draft import TreeDraftModel, make_candidates
from parallel.engine.speculation.tree_plan import TreePlan
from parallel.engine.speculation.tree_speculator import TreeDrafter, TreeSpeculator
from parallel.engine.step_timer import time_prepared


@dataclass(frozen=True)
class PlanCost:
    """Milliseconds of a pass that checks trees, of a draft model's passes before it (0 where none drafts), and of both
    as a step has them: less than their sum where layers are copied while drafts are made."""

    pass_ms: float
    draft_ms: float
    step_ms: float


@dataclass(frozen=True)
class FullTrees(HistoryDrafter):
    """The same tree in every row, with all its nodes."""

    plan: TreePlan

    def propose(self, rows: Rows, history: Tensor) -> TokenTree:
        num, device = self.plan.size - 1, history.device
        nodes = torch.arange(num, device=device).expand(len(rows.tokens), -1)
        width = -(-num // self.plan.depth)
        found = make_candidates(nodes, torch.where(nodes < width, ROOT, nodes - width), -nodes.float(), 1)
        found.depths.copy_(1 + nodes[0] // width)
        return choose_nodes(rows.tokens, found, self.plan)


def time_plan(
    engine: Engine, plan: TreePlan, contexts: Sequence[int], num_steps: int, communicator: Communicator
) -> PlanCost:
    """Medians of `num_steps` passes of sequences that have `contexts` tokens, captured or streamed as steps are.

    A plan of one token is a step without drafts. `engine.limits` must have room for the tree (num_ahead). All ranks
    call it together; each has times of its own.
    """

    def median_ms(run_rows: Callable[[int], object]) -> float:
        return statistics.median(time_prepared(engine, contexts, num_steps, communicator, run_rows, plan.depth))

    if plan.size == 1:
        pass_ms = median_ms(engine.plain_rows)
        return PlanCost(pass_ms, 0.0, pass_ms)
    full = speculator_of(engine, plan, FullTrees(plan))
    pass_ms, drafter = median_ms(pass_rows(engine, full)), drafter_of(engine, plan)
    if drafter is None:
        return PlanCost(pass_ms, 0.0, pass_ms)
    drafting = speculator_of(engine, plan, drafter)
    return PlanCost(pass_ms, median_ms(draft_rows(engine, drafting)), median_ms(pass_rows(engine, drafting)))


def speculator_of(engine: Engine, plan: TreePlan, drafter: TreeDrafter) -> TreeSpeculator:
    """With trees of `drafter`, which is captured where the engine's is; with the communicator of its first use."""
    speculator = TreeSpeculator(drafter, plan, engine.limits, engine.sampler, engine.target.stored, engine.device)
    if engine.captures_drafts and drafter.models:
        speculator.graphs = DraftGraphs(speculator.draft, engine.rows, engine.pool)
    return speculator


def pass_rows(engine: Engine, speculator: TreeSpeculator) -> Callable[[int], object]:
    """A step of the engine's first rows, so many."""
    return lambda num_rows: speculator.step(engine.rows.first(num_rows), engine.row_logits)


def drafter_of(engine: Engine, plan: TreePlan) -> TreeDraftModel | None:
    """Grows such trees by the engine's draft model; None where it has none, or nothing is to be grown."""
    speculator = engine.speculator
    if plan.size == 1 or speculator is None or not isinstance(speculator.drafter, ModelDrafter):
        return None
    return TreeDraftModel(speculator.drafter.model, speculator.drafter.sampler, plan)


def draft_rows(engine: Engine, speculator: TreeSpeculator) -> Callable[[int], object]:
    """What of such a step makes drafts."""
    return lambda num_rows: speculator.propose(engine.rows.first(num_rows))
