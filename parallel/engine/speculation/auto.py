"""Speculation whose trees change from step to step, and stop where they do not pay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.engine.graphs import StepGraphs
from parallel.engine.limits import EngineLimits
from parallel.engine.rows import Rows
from parallel.engine.sampling import Sampler
from parallel.engine.sequence import Part
from parallel.engine.speculation.drafter import ModelDrafter
from parallel.engine.speculation.fixed import FixedSpeculator
from parallel.engine.speculation.given import empty_given
from parallel.engine.speculation.history import History
from parallel.engine.speculation.policy import Policy
from parallel.engine.speculation.token_tree import NO_TOKEN, TokenTree
from parallel.engine.speculation.tree_plan import PLAIN, TreePlan
from parallel.engine.speculation.tree_speculator import TreeDrafter, TreeSpeculator
from parallel.engine.tree_rows import TreeRows
from parallel.kernels.pages import PagedKV


class AutoSpeculator:
    """As TreeSpeculator, with a tree of the `plan` that `choose` set for the step; PLAIN until there was a choice.

    `drafters` share a model, where they have one. It sees nothing of plain steps: when trees begin again, it takes in
    what it has missed.
    """

    def __init__(
        self,
        drafters: Mapping[TreePlan, TreeDrafter],
        limits: EngineLimits,
        sampler: Sampler,
        stored: Sequence[Sequence[PagedKV]],
        device: torch.device,
    ) -> None:
        self.history = History.empty(limits.batch_size, limits.max_context, device)
        self.trees = {
            plan: TreeSpeculator(drafter, plan, limits, sampler, stored, device, self.history)
            for plan, drafter in drafters.items()
        }
        self.policy = Policy(tuple(drafters))
        self.drafter = next(iter(drafters.values()))
        self.num_drafts = max(plan.depth for plan in drafters)
        self.rows_per_sequence = max(plan.size for plan in drafters)
        self.sampler, self.plan = sampler, PLAIN
        self.plain_given = empty_given(limits.batch_size, 0, device)
        # Plain steps since the draft model was last asked.
        self.num_missed = 0

    @property
    def given(self) -> Tensor:
        return self.plain_given if self.plan == PLAIN else self.trees[self.plan].given

    @property
    def chosen_plan(self) -> TreePlan:
        return self.plan

    @property
    def drafting(self) -> list[FixedSpeculator[Any]]:
        """What makes drafts: one for each tree that a step may have."""
        return list(self.trees.values())

    def prefill(self, parts: Sequence[Part]) -> None:
        self.drafter.prefill(parts)

    def propose(self, rows: Rows) -> TokenTree | None:
        return None if self.plan == PLAIN else self.trees[self.plan].propose(rows)

    def choose(self, rows: Rows) -> None:
        """The plan of the next step, of `rows`, the engine's first."""
        self.plan = self.policy.choose(len(rows.tokens))
        if self.plan == PLAIN:
            self.num_missed += 1
            return
        if self.num_missed and isinstance(self.drafter, ModelDrafter):
            self.drafter.take_in(rows, self.history.tokens[: len(rows.tokens)], self.num_missed)
        self.num_missed = 0

    def learn(self, plan: TreePlan, nodes: Sequence[int]) -> None:
        """What came true in a sequence's step; see Policy.learn."""
        self.policy.learn(plan, nodes)

    def step(self, rows: Rows, row_logits: Callable[[Rows | TreeRows], Tensor]) -> None:
        if self.plan != PLAIN:
            self.trees[self.plan].step(rows, row_logits)
            return
        tokens = self.sampler(row_logits(rows), rows.keys, rows.positions + 1)
        given = self.plain_given[: len(tokens)]
        given[:, 1] = torch.where(rows.active > 0, tokens, NO_TOKEN)
        self.history.append(rows.positions, tokens.unsqueeze(1), rows.active)
        rows.advance(tokens, rows.active)

    def capture_steps(self, run_step: Callable[[int], None], max_rows: int, pool: Any) -> Callable[[int], None]:
        """Graphs of all plans of `run_step`, which steps here; what runs that of the plan chosen."""
        graphs = {}
        # The largest first: the others fit into its memory.
        for plan in sorted((PLAIN, *self.trees), key=lambda plan: -plan.size):
            self.plan = plan
            graphs[plan] = StepGraphs(run_step, max_rows, pool)
        self.plan = PLAIN
        return lambda num_rows: graphs[self.plan].run(num_rows)
