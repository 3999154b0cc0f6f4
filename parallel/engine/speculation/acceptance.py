"""How many drafts came true; without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Acceptance:
    """Counted for each sequence and step whose tokens were wanted. Drafts behind the end of an answer are not accepted.

    `lengths`: how often so many drafts were accepted. `drafted`: drafts that could have been.
    """

    lengths: Counter[int] = field(default_factory=Counter)
    drafted: int = 0

    def add(self, num_drafts: int, num_accepted: int) -> None:
        self.lengths[num_accepted] += 1
        self.drafted += num_drafts

    @property
    def accepted(self) -> int:
        return sum(length * count for length, count in self.lengths.items())

    @property
    def accepted_per_step(self) -> float | None:
        """The mean over sequences and steps; None where there was no step."""
        return self.accepted / self.lengths.total() if self.lengths else None

    def histogram(self, num_drafts: int) -> list[int]:
        """How often 0, 1, ... `num_drafts` drafts were accepted."""
        return [self.lengths[length] for length in range(num_drafts + 1)]


def join(parts: Iterable[Acceptance]) -> Acceptance:
    whole = Acceptance()
    for part in parts:
        whole.lengths += part.lengths
        whole.drafted += part.drafted
    return whole
