"""Which tree the next step checks: the one that promises most tokens a second, by measured times and by what came true.

Any choice leaves answers as they are. A token of an answer is what the model draws at its place, from its logits there
and noise that is a function of the sequence and the place; drafts only say how many places a step gets through. So the
choice may follow the very tokens it is about to guess, which would bias a rule that accepts a draft by its own luck.

All ranks choose alike: times are one rank's (see tune.py), tokens are equal on all, and nothing else is looked at.
Without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from parallel.engine.speculation.tree_plan import PLAIN, TreePlan

# Steps of a sequence after which what was seen counts half: text changes, and so does what guesses are worth.
HALF_LIFE = 500
DECAY = 0.5 ** (1 / HALF_LIFE)
# What has not been seen so often counts as if it had come true as often as it could: so that it is tried, and again
# when that is long ago.
NUM_HOPED = 1.0


@dataclass
class Seen:
    """How many trees had nodes of some ranks at some depth, and how many of those nodes came true; both decayed."""

    trees: float = 0.0
    accepted: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Milliseconds of a step, for some numbers of sequences, in ascending order."""

    by_num: tuple[tuple[int, float], ...]

    def of(self, num_sequences: int) -> float:
        """Between those that were measured, on a line."""
        below = [each for each in self.by_num if each[0] <= num_sequences]
        above = [each for each in self.by_num if each[0] >= num_sequences]
        (low, low_ms), (high, high_ms) = (below or above[:1])[-1], (above or below[-1:])[0]
        share = (num_sequences - low) / (high - low) if high > low else 0.0
        return low_ms + share * (high_ms - low_ms)


@dataclass
class Policy:
    """Of trees of `plans`, and none (PLAIN). Plain steps until there are `costs`.

    A tree's nodes stand in the order of their chances, so that the first of a large tree are a smaller one: what came
    true of a tree tells what would have of all smaller, shallower ones. Ranks are told apart by sizes of plans.
    """

    plans: Sequence[TreePlan]
    costs: Mapping[TreePlan, Costs] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = sorted({1, *(plan.size for plan in self.plans)})
        self.buckets = list(pairwise(sizes))
        depths = range(1, 1 + max(plan.depth for plan in self.plans))
        self.seen = {(bucket, depth): Seen() for bucket in self.buckets for depth in depths}

    def choose(self, num_sequences: int) -> TreePlan:
        """For a step of so many sequences."""
        if not self.costs:
            return PLAIN
        return max((PLAIN, *self.plans), key=lambda plan: self.expected(plan) / self.costs[plan].of(num_sequences))

    def expected(self, plan: TreePlan) -> float:
        """Tokens that a sequence gets in a step: one, and one more for each depth at which a node comes true."""
        tokens, above = 1.0, 1.0
        for depth in range(1, plan.depth + 1):
            here = 0.0
            for bucket in self.buckets_of(plan):
                seen = self.seen[bucket, depth]
                # At a depth one node comes true at most, and only below one that did.
                hoped = max(0.0, above - here)
                here += (seen.accepted + NUM_HOPED * hoped) / (seen.trees + NUM_HOPED)
            above = min(above, here)
            tokens += above
        return tokens

    def buckets_of(self, plan: TreePlan) -> Iterable[tuple[int, int]]:
        return (bucket for bucket in self.buckets if bucket[1] <= plan.size)

    def learn(self, plan: TreePlan, nodes: Sequence[int]) -> None:
        """A sequence's step checked a tree of `plan`, of which `nodes`, from the newest token on, came true."""
        for seen in self.seen.values():
            seen.trees *= DECAY
            seen.accepted *= DECAY
        for bucket in self.buckets_of(plan):
            for depth in range(1, plan.depth + 1):
                self.seen[bucket, depth].trees += 1
        for depth, node in enumerate(nodes, 1):
            bucket = next(bucket for bucket in self.buckets if node < bucket[1])
            self.seen[bucket, depth].accepted += 1
