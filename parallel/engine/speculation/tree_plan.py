"""How large a tree of drafts is; without torch, for plans."""

from __future__ import annotations

from dataclasses import dataclass

# Tokens of a sequence in a pass in which a draft model takes in what it has missed.
TAKEN_IN = 64


@dataclass(frozen=True)
class TreePlan:
    """`size`: tokens of a sequence that a pass checks, the newest among them; `depth`: the most that follow it.

    `top_k` is of a draft model: at each depth it goes on from so many nodes, with so many children each.
    """

    size: int
    depth: int
    top_k: int

    @property
    def num_candidates(self) -> int:
        """Nodes that a draft model gives, of which the likeliest are checked."""
        return self.top_k + (self.depth - 1) * self.top_k**2

    @property
    def num_grown(self) -> int:
        """Nodes from which a draft model goes on: its cache has them."""
        return (self.depth - 1) * self.top_k

    @property
    def num_ahead(self) -> int:
        """Slots beyond the newest token's that a tree takes, of the model or of its draft."""
        return max(self.size - 1, self.num_grown)


# A step without drafts.
PLAIN = TreePlan(1, 0, 0)
# What is chosen from: enough for steps that cost much for a row, and for those that cost nothing. Each is a graph.
TREES = tuple(
    TreePlan(*sizes)
    for sizes in ((4, 3, 2), (16, 4, 4), (16, 8, 4), (64, 5, 8), (64, 10, 8), (256, 6, 12), (256, 12, 12))
)
CHAINS = tuple(TreePlan(1 + num, num, 1) for num in (1, 2, 4, 8, 16))
