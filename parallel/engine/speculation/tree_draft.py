"""Trees of drafts by a small model, grown depth by depth: one pass of it over as many nodes at each depth.

Of the children at a depth, `top_k` of each node, the model goes on from the `top_k` with the best chances, which are
the product of those along the way; of all it has seen, the best are checked (the shape of EAGLE-2's trees: Li et al.,
"EAGLE-2: Faster inference of language models with dynamic draft trees", 2024). Every size is known beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.engine.rows import Rows
from parallel.engine.speculation.drafter import ModelDrafter
from parallel.engine.speculation.token_tree import ROOT, Candidates, TokenTree, choose_nodes
from parallel.engine.speculation.tree_plan import TreePlan
from parallel.engine.tree_rows import tree_rows
from parallel.kernels.node_bits import bits_of, num_words


@dataclass(frozen=True)
class Level:
    """Nodes of one depth from which the model goes on, [rows, top_k] each: their places among the candidates, their
    tokens, scores, and, [rows, top_k, words], who is seen by whom in the model's cache."""

    ids: Tensor
    tokens: Tensor
    scores: Tensor
    masks: Tensor


@dataclass(frozen=True)
class TreeDraftModel(ModelDrafter):
    """Its cache has the nodes from which it went on, depth by depth, in the slots after the newest token's."""

    plan: TreePlan

    @property
    def num_words(self) -> int:
        """Of a mask of nodes in its cache."""
        return num_words(max(1, self.plan.num_grown))

    def propose(self, rows: Rows, history: Tensor) -> TokenTree:
        """The first pass takes the newest token and the one before, as DraftModel's: the last draft that came true may
        not have been through this model, as those before it have."""
        top_k, num_levels = self.plan.top_k, self.plan.depth
        found = self._after_newest(rows, history)
        ids = torch.arange(top_k, device=history.device).expand_as(found.tokens)
        level = Level(ids, found.tokens, found.scores, bits_of(ids, self.num_words))
        for depth in range(1, num_levels):
            first = 1 + (depth - 1) * top_k
            found.places.scatter_(1, level.ids, first + ids)
            children, level = self._grow(rows, level, depth, first, found.tokens.shape[1])
            found = join(found, children)
        return choose_nodes(rows.tokens, found, self.plan)

    def _after_newest(self, rows: Rows, history: Tensor) -> Candidates:
        before = history.gather(1, (rows.positions - 1).clamp(min=0).unsqueeze(1)).long()
        spread = rows.spread(torch.cat([before, rows.tokens.unsqueeze(1)], dim=1), -1)
        known = replace(spread, tokens=self.sampler.readable(spread.tokens))
        logits = self.model.decoder.logits(self.model.row_states(known)[1::2])
        tokens, scores = self.sampler.guesses(logits, known.keys[1::2], known.positions[1::2] + 1, self.plan.top_k)
        return make_candidates(tokens, torch.full_like(tokens, ROOT), scores, 1)

    def _grow(self, rows: Rows, level: Level, depth: int, first: int, num_found: int) -> tuple[Candidates, Level]:
        """The children of a level, which come after `num_found` candidates, and the next level among them."""
        top_k = self.plan.top_k
        nodes = tree_rows(rows, level.tokens, torch.full_like(level.tokens, depth), level.masks, first=first, start=1)
        logits = self.model.decoder.logits(self.model.row_states(nodes))
        tokens, chances = self.sampler.guesses(logits, nodes.keys, nodes.positions + 1, top_k)
        scores = (level.scores.unsqueeze(2) + chances.view(-1, top_k, top_k)).flatten(1)
        tokens = tokens.view(scores.shape)
        children = make_candidates(tokens, level.ids.repeat_interleave(top_k, dim=1), scores, depth + 1)
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        own = bits_of(torch.arange(depth * top_k, (depth + 1) * top_k, device=best.device), self.num_words)
        masks = level.masks.gather(1, (best // top_k).unsqueeze(2).expand(-1, -1, self.num_words)) | own
        return children, Level(num_found + best, tokens.gather(1, best), scores.gather(1, best), masks)


def make_candidates(tokens: Tensor, parents: Tensor, scores: Tensor, depth: int) -> Candidates:
    depths = torch.full(tokens.shape[1:], depth, device=tokens.device)
    return Candidates(tokens, parents, depths, scores, torch.zeros_like(tokens))


def join(first: Candidates, second: Candidates) -> Candidates:
    return Candidates(
        *(
            torch.cat([getattr(first, name), getattr(second, name)], dim=-1)
            for name in ("tokens", "parents", "depths", "scores", "places")
        )
    )
