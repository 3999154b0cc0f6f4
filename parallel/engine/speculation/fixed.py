"""What speculation has in common whose drafts are of one shape in every step: chains, or trees of one plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic

import torch

from parallel.engine.graphs import StepGraphs
from parallel.engine.limits import EngineLimits
from parallel.engine.rows import Rows
from parallel.engine.sampling import Sampler
from parallel.engine.sequence import Part
from parallel.engine.speculation.draft_graphs import DraftGraphs, Drafts
from parallel.engine.speculation.drafter import Drafter
from parallel.engine.speculation.given import empty_given
from parallel.engine.speculation.history import History
from parallel.engine.speculation.tree_plan import TreePlan


class FixedSpeculator(Generic[Drafts]):
    """Drafts of an engine's rows. `given`: what the last step gave to each row, as of empty_given. `graphs`: what
    `propose` runs in place of `draft`, where that is captured. `history`: shared with others, where there are any."""

    # As of AutoSpeculator: here none is chosen.
    chosen_plan: ClassVar[TreePlan | None] = None
    graphs: DraftGraphs[Drafts] | None = None

    def __init__(
        self,
        drafter: Drafter[Drafts],
        num_drafts: int,
        rows_per_sequence: int,
        limits: EngineLimits,
        sampler: Sampler,
        device: torch.device,
        history: History | None = None,
    ) -> None:
        self.drafter: Drafter[Drafts] = drafter
        self.sampler, self.num_drafts, self.rows_per_sequence = sampler, num_drafts, rows_per_sequence
        self.history = history or History.empty(limits.batch_size, limits.max_context, device)
        self.given = empty_given(limits.batch_size, num_drafts, device)

    @property
    def drafting(self) -> list[FixedSpeculator[Any]]:
        """What makes drafts: one for each shape that a step may have."""
        return [self]

    def prefill(self, parts: Sequence[Part]) -> None:
        self.drafter.prefill(parts)

    def choose(self, rows: Rows) -> None:
        """Before each step; see AutoSpeculator."""

    def learn(self, plan: TreePlan, nodes: Sequence[int]) -> None:
        """After steps with a chosen plan; see AutoSpeculator."""

    def propose(self, rows: Rows) -> Drafts:
        """Drafts of `rows`, the engine's first; until the next."""
        return self.draft(rows) if self.graphs is None else self.graphs.run(len(rows.tokens))

    def draft(self, rows: Rows) -> Drafts:
        return self.drafter.propose(rows, self.history.tokens[: len(rows.tokens)])

    def capture_drafts(self, rows: Rows, pool: Any) -> None:
        """Graphs, in the memory `pool`, of what `propose` does for the engine's `rows`."""
        self.graphs = DraftGraphs(self.draft, rows, pool)
        self.graphs.prepare()

    def capture_steps(self, run_step: Callable[[int], None], max_rows: int, pool: Any) -> Callable[[int], None]:
        """Graphs of `run_step`, which steps here, in the memory `pool`; what runs the one for so many rows."""
        return StepGraphs(run_step, max_rows, pool).run
