"""Trees of drafts by looking up: several ways in which the text went on after what the last few tokens are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.engine.rows import Rows
from parallel.engine.speculation.drafter import HistoryDrafter
from parallel.engine.speculation.ngram import continuations
from parallel.engine.speculation.token_tree import NO_TOKEN, ROOT, Candidates, TokenTree, choose_nodes
from parallel.engine.speculation.tree_plan import TreePlan

# Places that are looked at: many go on alike.
NUM_MATCHES = 16


@dataclass(frozen=True)
class NgramTrees(HistoryDrafter):
    """Merges what followed the best matches into one tree; the best of them has all its tokens before the next has any.

    Matches are as NgramDrafter's.
    """

    plan: TreePlan
    longest: int
    shortest: int

    def propose(self, rows: Rows, history: Tensor) -> TokenTree:
        num = min(NUM_MATCHES, history.shape[1])
        found = continuations(history, rows.positions, self.plan.depth, self.longest, self.shortest, num)
        return choose_nodes(rows.tokens, merge(found), self.plan)


def merge(found: Tensor) -> Candidates:
    """A tree's nodes from continuations [rows, num, depth], the best first, NO_TOKEN in those that are none.

    Continuations that begin alike share nodes: those of the first of them.
    """
    rows, num, depth = found.shape
    alike = (found.unsqueeze(2) == found.unsqueeze(1)).cumprod(3)
    # [rows, num, depth]: the first continuation that is the same up to there, itself at the latest.
    first = alike.argmax(2)
    number = torch.arange(num, device=found.device).view(1, num, 1)
    is_new = (first == number) & (found != NO_TOKEN)
    ids = first * depth + torch.arange(depth, device=found.device)
    parents = torch.cat([torch.full_like(ids[:, :, :1], ROOT), ids[:, :, :-1]], dim=2)
    scores = torch.where(is_new, -number.float(), -torch.inf)
    depths = torch.arange(1, depth + 1, device=found.device).repeat(num)
    flat = (each.reshape(rows, -1) for each in (found, parents, scores))
    tokens, parents, scores = flat
    return Candidates(tokens, parents, depths, scores, torch.zeros_like(tokens))
