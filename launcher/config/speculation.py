"""How an engine guesses tokens ahead of the model, which checks them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from launcher.config.model import QuantizeKind
from parallel.engine.speculation.tree_plan import CHAINS, TAKEN_IN, TREES, TreePlan
from parallel.kernels.limits import MAX_NODES

# A step of more rows than this takes longer than what drafts that far ahead save.
MAX_DRAFTS = 16
AUTO = "auto"
# Settings of a small model, and of how much is guessed.
DRAFT_MODEL = ("draft_path", "draft_quantize")
GUESSES = ("num_drafts", "tree_size")


class SpeculationKind(str, Enum):
    """`ngram` looks up what followed the last tokens before, in prompt and answer; `draft` asks a small model."""

    none = "none"
    ngram = "ngram"
    draft = "draft"


@dataclass
class SpeculationConfig:
    kind: SpeculationKind = SpeculationKind.none
    # Tokens guessed for each sequence and step, one after the other. `auto`: as many as pay, step by step, or none, by
    # measured times and by how many came true.
    num_drafts: int | str = 4
    # A tree of guesses in place of num_drafts: tokens of a sequence that a step checks, its newest among them; null for
    # none. Then guesses that follow one another, at most, and, for kind=draft, how many nodes the small model goes on
    # from at each depth, with so many children each. tree_size=auto chooses all three, as num_drafts=auto does.
    tree_size: int | str | None = None
    tree_depth: int = 6
    tree_top_k: int = 6
    # The largest tree that tree_size=auto may choose: a step has memory for it.
    tree_max: int = 64
    # kind=draft: the small model, of the same tokenizer; as model.path.
    draft_path: str | None = None
    # What model.quantize is for the model.
    draft_quantize: QuantizeKind = QuantizeKind.none
    # kind=ngram: look up the last ngram_max tokens, else fewer, down to ngram_min.
    ngram_max: int = 3
    ngram_min: int = 2

    def problems(self) -> Iterator[str]:
        if self.num_drafts != AUTO and not (isinstance(self.num_drafts, int) and 1 <= self.num_drafts <= MAX_DRAFTS):
            yield f"speculation.num_drafts={self.num_drafts} must be from 1 to {MAX_DRAFTS}, or {AUTO}."
        if not 1 <= self.ngram_min <= self.ngram_max:
            yield (
                f"speculation.ngram_min={self.ngram_min} must be at least 1 and at most speculation.ngram_max="
                f"{self.ngram_max}."
            )
        if self.tree_size == AUTO and not TREES[0].size <= self.tree_max <= MAX_NODES:
            yield f"speculation.tree_max={self.tree_max} must be from {TREES[0].size} to {MAX_NODES}."
        elif self.tree_size not in (AUTO, None):
            yield from self._tree_problems(self.tree_size)
        if self.kind == SpeculationKind.draft and not (self.draft_path or "").strip():
            yield "speculation.kind=draft needs speculation.draft_path: the folder or hub name of a small model."
        if self.kind == SpeculationKind.ngram:
            yield from self._unread()

    def _unread(self) -> Iterator[str]:
        for name in self.given(DRAFT_MODEL):
            yield (
                f"speculation.{name} is read by speculation.kind=draft only, not by kind={self.kind.value}. "
                "Leave it out or set the kind."
            )

    def given(self, names: Sequence[str]) -> list[str]:
        """Those that are not what they are by default."""
        default = SpeculationConfig()
        return [name for name in names if getattr(self, name) != getattr(default, name)]

    def notes(self) -> Iterator[str]:
        """What a run without speculation leaves unread. Sweeps may have such jobs beside others; who forgot the kind
        would take a run for one with speculation."""
        if self.kind == SpeculationKind.none and (given := self.given((*DRAFT_MODEL, *GUESSES))):
            names = ", ".join(given)
            yield f"speculation.kind=none reads nothing of speculation: {names}. Set kind=ngram or draft to use them."

    def _tree_problems(self, size: int | str | None) -> Iterator[str]:
        if not isinstance(size, int) or not 2 <= size <= MAX_NODES:
            yield f"speculation.tree_size={size} must be from 2 to {MAX_NODES}, {AUTO}, or null for no tree."
            return
        plan = TreePlan(size, self.tree_depth, self.tree_top_k)
        yield from self.depth_problems()
        if self.kind == SpeculationKind.draft and plan.top_k >= 1 and plan.num_candidates < plan.size - 1:
            yield (
                f"speculation.tree_size={plan.size}: with speculation.tree_depth={plan.depth} and "
                f"speculation.tree_top_k={plan.top_k} there are {plan.num_candidates} guesses. Raise one of those, or "
                "lower the size."
            )

    def depth_problems(self) -> Iterator[str]:
        """Of depth and children, whatever the size."""
        if not 1 <= self.tree_depth <= MAX_DRAFTS:
            yield f"speculation.tree_depth={self.tree_depth} must be from 1 to {MAX_DRAFTS}."
        num_grown = TreePlan(1, self.tree_depth, self.tree_top_k).num_grown
        if self.tree_top_k < 1:
            yield f"speculation.tree_top_k={self.tree_top_k} must be at least 1."
        elif self.kind == SpeculationKind.draft and num_grown > MAX_NODES:
            yield (
                f"speculation.tree_depth={self.tree_depth} and speculation.tree_top_k={self.tree_top_k}: the draft "
                f"model keeps (tree_depth - 1) * tree_top_k = {num_grown} nodes of a tree, and attention takes "
                f"{MAX_NODES}. Lower one of them."
            )

    def tree_of(self, size: int) -> TreePlan:
        """Of so many tokens; of one there is nothing to guess."""
        return TreePlan(size, min(self.tree_depth, size - 1), self.tree_top_k if size > 1 else 0)

    @property
    def tree(self) -> TreePlan | None:
        """None where each step has the same, a chain or nothing, or chooses."""
        if self.kind == SpeculationKind.none or not isinstance(self.tree_size, int):
            return None
        return TreePlan(self.tree_size, self.tree_depth, self.tree_top_k)

    @property
    def choices(self) -> tuple[TreePlan, ...]:
        """What each step chooses from; none where all are alike."""
        if self.kind == SpeculationKind.none:
            return ()
        if self.tree_size == AUTO:
            return tuple(tree for tree in TREES if tree.size <= self.tree_max)
        return CHAINS if self.tree_size is None and self.num_drafts == AUTO else ()

    @property
    def trees(self) -> tuple[TreePlan, ...]:
        """All that a step may have."""
        return self.choices if self.tree is None else (self.tree,)

    @property
    def chain(self) -> int:
        """Guesses of a step without trees."""
        return self.num_drafts if isinstance(self.num_drafts, int) and self.kind != SpeculationKind.none else 0

    @property
    def longest(self) -> int:
        """Guesses of a step that can come true, at most."""
        return max((tree.depth for tree in self.trees), default=self.chain)

    @property
    def rows_per_sequence(self) -> int:
        """Rows that a sequence takes in a decode step, at most."""
        return max((tree.size for tree in self.trees), default=1 + self.chain)

    @property
    def drafting_rows(self) -> int:
        """Rows that it takes in a pass in which a draft model drafts: at first its newest token, and the one before."""
        return max([2, *(tree.top_k for tree in self.trees)])

    @property
    def draft_rows(self) -> int:
        """Rows that it takes in a pass of a draft model."""
        return max(self.drafting_rows, TAKEN_IN if self.choices else 0)

    @property
    def drafting_passes(self) -> int:
        """Of a draft model, for all trees that a step may have."""
        return sum(tree.depth for tree in self.trees) or self.chain

    @property
    def num_ahead(self) -> int:
        """Slots in the cache that it takes beyond its tokens'."""
        return max((tree.num_ahead for tree in self.trees), default=0)
