"""Passes of prompts draw more power than steps do: cards that go on with them are soon held by their limit."""

from __future__ import annotations

from dataclasses import dataclass

# Until a card is held: on H200s prompts of 25 to 125 ms took what passes after a pause do, those of 250 to 300 ms 7 %
# more, and those of a second and more 9 %; 80 to 150 fit such times alike (results/LOG.md).
LAG_MS = 100.0


@dataclass
class PowerLimit:
    """Of one run of passes; `slowdown`: how many times as long they take the card once it is held."""

    slowdown: float
    passed_ms: float = 0.0

    def held(self, card_ms: float) -> float:
        """What the next pass takes the card, `card_ms` after a pause."""
        free_ms = min(card_ms, max(0.0, LAG_MS - self.passed_ms))
        self.passed_ms += card_ms
        return free_ms + self.slowdown * (card_ms - free_ms)
