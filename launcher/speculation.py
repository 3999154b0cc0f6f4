"""How an engine guesses tokens ahead of the model, which checks them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

# A step of more rows than this takes longer than what drafts that far ahead save.
MAX_DRAFTS = 16


class SpeculationKind(str, Enum):
    """`ngram` looks up what followed the last tokens before, in prompt and answer; `draft` asks a small model."""

    none = "none"
    ngram = "ngram"
    draft = "draft"


@dataclass
class SpeculationConfig:
    kind: SpeculationKind = SpeculationKind.none
    # Tokens guessed for each sequence and step.
    num_drafts: int = 4
    # kind=draft: the small model, of the same tokenizer; as model.path.
    draft_path: str | None = None
    # kind=ngram: look up the last ngram_max tokens, else fewer, down to ngram_min.
    ngram_max: int = 3
    ngram_min: int = 2

    def problems(self) -> Iterator[str]:
        if not 1 <= self.num_drafts <= MAX_DRAFTS:
            yield f"speculation.num_drafts={self.num_drafts} must be from 1 to {MAX_DRAFTS}."
        if not 1 <= self.ngram_min <= self.ngram_max:
            yield (
                f"speculation.ngram_min={self.ngram_min} must be at least 1 and at most speculation.ngram_max="
                f"{self.ngram_max}."
            )
        if self.kind == SpeculationKind.draft and not (self.draft_path or "").strip():
            yield "speculation.kind=draft needs speculation.draft_path: the folder or hub name of a small model."
        if self.kind != SpeculationKind.draft and self.draft_path is not None:
            yield (
                f"speculation.draft_path is read by speculation.kind=draft only, not by kind={self.kind.value}. "
                "Leave it out or set the kind."
            )

    @property
    def rows_per_sequence(self) -> int:
        """Rows that a sequence takes in a decode step."""
        return 1 if self.kind == SpeculationKind.none else 1 + self.num_drafts
