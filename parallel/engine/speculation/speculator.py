"""Speculative decoding: tokens are guessed cheaply, and one step of the model checks all guesses of all sequences.

A sequence takes a row for its newest token and one for each draft, at the positions that follow: weights are read once
for all, and the context once for all rows of a sequence. What the model draws at each of them is what it would draw in
a step of its own, if the tokens before are right; so drafts are kept for as long as they equal the draws, and the first
draw that differs comes in place of the draft. Keys and values of refused drafts are overwritten by the next step.

Draws are a function of the logits, the sequence and the position alone (parallel/engine/noise.py), and a draft model
uses the same noise. So an answer is what it is without speculation, greedy or sampled, token for token as far as
logits do not depend on the number of rows; its distribution is the model's own. Drafts are accepted with the
probability of a coupling by common noise (Daliri, Musco, Suresh, "Coupling without communication and drafter-invariant
speculative decoding", 2024): at least (1 - d) / (1 + d) where d is the total variation distance of the two models'
distributions. The rule of Leviathan et al. ("Fast inference from transformers via speculative decoding", 2023), whose
answers change with the drafts, accepts 1 - d. With four of the demo model's five layers as its draft, over 700 tokens
of Python at temperature 0.5, 0.8 and 1: 0.304, 0.315 and 0.320 against 0.323, 0.357 and 0.385. Of drafts that are
looked up, and of greedy ones, both accept the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parallel.engine.limits import EngineLimits
from parallel.engine.rows import Rows
from parallel.engine.sampling import Sampler
from parallel.engine.speculation.drafter import Drafter
from parallel.engine.speculation.fixed import FixedSpeculator
from parallel.engine.speculation.given import put_given
from parallel.engine.speculation.token_tree import NO_TOKEN
from parallel.engine.speculation.tree_plan import TreePlan


@dataclass(frozen=True)
class Speculation:
    """How an engine guesses: `kind` is ngram or draft. `draft`: a loaded, sharded model, which is taken over."""

    kind: str
    num_drafts: int = 4
    ngram_max: int = 3
    ngram_min: int = 2
    draft: PreTrainedModel | None = None
    # A tree of drafts in place of a chain of num_drafts; or several, of which each step has one, or none.
    tree: TreePlan | None = None
    choices: tuple[TreePlan, ...] = ()

    @property
    def num_ahead(self) -> int:
        """See EngineLimits."""
        trees = self.choices if self.tree is None else (self.tree,)
        return max((tree.num_ahead for tree in trees), default=0)


class Speculator(FixedSpeculator[Tensor]):
    """Chains of `num_drafts`."""

    def __init__(
        self, drafter: Drafter[Tensor], num_drafts: int, limits: EngineLimits, sampler: Sampler, device: torch.device
    ) -> None:
        super().__init__(drafter, num_drafts, 1 + num_drafts, limits, sampler, device)

    def step(self, rows: Rows, row_logits: Callable[[Rows], Tensor]) -> None:
        """Drafts, checks, and advances `rows`, the engine's first, as far as drafts were right and one further."""
        drafts = self.propose(rows)
        tokens = torch.cat([rows.tokens.unsqueeze(1), self.sampler.readable(drafts).clamp(min=0)], dim=1)
        checked = rows.spread(tokens, 0)
        drawn = self.sampler(row_logits(checked), checked.keys, checked.positions + 1).view(tokens.shape)
        active = checked.active.view(tokens.shape)
        counts = count_right(drafts, drawn, active)
        nodes = torch.arange(drawn.shape[1], device=drawn.device).expand_as(drawn)
        num_drafts = ((drafts != NO_TOKEN) * active[:, 1:]).sum(1)
        put_given(self.given[: len(drawn)], num_drafts, drawn, nodes, counts)
        self.history.append(rows.positions, drawn, counts)
        rows.advance(drawn.gather(1, (counts - 1).clamp(min=0).unsqueeze(1)).squeeze(1), counts)


def count_right(drafts: Tensor, drawn: Tensor, active: Tensor) -> Tensor:
    """[rows]: of the tokens `drawn` [rows, 1 + num_drafts], how many have only right `drafts` before them.

    0 in rows whose newest token is not `active` [rows, 1 + num_drafts], as drafts count only where they are.
    """
    right = (drafts == drawn[:, :-1]) * active[:, 1:]
    return (1 + right.cumprod(1).sum(1)) * active[:, 0]
