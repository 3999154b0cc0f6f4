"""Speculation by trees: a pass checks several drafts for each place, of which at most one can come true.

What holds for a chain of drafts (see Speculator) holds along every branch: the model draws after each node what it
would draw there in a step of its own, with the noise of that place, and a node is kept if it is what was drawn after
its parent. So answers stay what they are without drafts, token for token, and a draft model ranks its children by the
race with that noise. In a pass a sequence's nodes lie behind its tokens in the cache, in any order; the keys and values
of the branch that came true are then copied to the places where tokens stay, and nothing remains of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from parallel.engine.limits import EngineLimits
from parallel.engine.rows import Rows, slots_at
from parallel.engine.sampling import Sampler
from parallel.engine.speculation.drafter import Drafter
from parallel.engine.speculation.fixed import FixedSpeculator
from parallel.engine.speculation.given import put_given
from parallel.engine.speculation.history import History
from parallel.engine.speculation.token_tree import TokenTree, follow
from parallel.engine.speculation.tree_plan import TreePlan
from parallel.engine.tree_rows import TreeRows, newest_places, tree_rows
from parallel.kernels.pages import PagedKV, move_tokens

TreeDrafter = Drafter[TokenTree]


class TreeSpeculator(FixedSpeculator[TokenTree]):
    """Trees of `plan`: in `given` places are those in the tree, whose depth is the most drafts. `stored`: the model's
    pages, see PagedModel."""

    def __init__(
        self,
        drafter: TreeDrafter,
        plan: TreePlan,
        limits: EngineLimits,
        sampler: Sampler,
        stored: Sequence[Sequence[PagedKV]],
        device: torch.device,
        history: History | None = None,
    ) -> None:
        super().__init__(drafter, plan.depth, plan.size, limits, sampler, device, history)
        self.plan, self.stored = plan, stored

    def step(self, rows: Rows, row_logits: Callable[[Rows | TreeRows], Tensor]) -> None:
        """Drafts, checks, and advances `rows`, the engine's first, along the branch that came true and one further."""
        tree = self.propose(rows)
        checked = self.rows_of(rows, tree)
        drawn = self.sampler(row_logits(checked), checked.keys, checked.positions + 1).view(tree.tokens.shape)
        active = checked.active.view(tree.tokens.shape)
        path, counts = follow(tree, drawn, active, self.plan.depth)
        tokens = drawn.gather(1, path)
        put_given(self.given[: len(tokens)], active[:, 1:].sum(1), tokens, path, counts)
        self._keep(rows, tree, path, counts)
        self.history.append(rows.positions, tokens, counts)
        rows.advance(tokens.gather(1, (counts - 1).clamp(min=0).unsqueeze(1)).squeeze(1), counts)

    def rows_of(self, rows: Rows, tree: TokenTree) -> TreeRows:
        return tree_rows(rows, self.sampler.readable(tree.tokens), tree.depths, tree.masks, first=0, start=0)

    def _keep(self, rows: Rows, tree: TokenTree, path: Tensor, counts: Tensor) -> None:
        """Copies the branch that came true to where the next tokens follow, in the caches of all models."""
        nodes = path[:, 1:]
        depths = torch.arange(1, 1 + self.plan.depth, device=path.device).expand_as(nodes)
        is_kept = depths < counts.unsqueeze(1)
        self._move(self.stored, rows, nodes, depths, is_kept)
        if self.drafter.caches:
            places = tree.places.gather(1, nodes)
            # What the draft model does not have is the branch's last, which it takes in next.
            self._move([self.drafter.caches], rows, places, depths, is_kept & (places > 0))

    def _move(
        self, stored: Sequence[Sequence[PagedKV]], rows: Rows, places: Tensor, depths: Tensor, is_kept: Tensor
    ) -> None:
        """Both in slots after the newest token's."""
        newest = newest_places(rows)[0].unsqueeze(1)
        sources, targets = (slots_at(rows.block_table, newest + each) * is_kept for each in (places, depths))
        for caches in stored:
            move_tokens(caches, sources.flatten(), targets.flatten())
