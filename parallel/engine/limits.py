"""What an engine has room for; without torch, for plans."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Tokens of a page of the KV cache.
PAGE_SIZE = 64


@dataclass(frozen=True)
class EngineLimits:
    """Tokens of a sequence, sequences at a time, and tokens of prompts in one pass."""

    max_context: int
    batch_size: int
    prefill_chunk: int

    @property
    def pages_per_sequence(self) -> int:
        return math.ceil(self.max_context / PAGE_SIZE)

    @property
    def num_pages(self) -> int:
        """Enough for every sequence at its longest, and page 0, where rows without a sequence write."""
        return 1 + self.batch_size * self.pages_per_sequence
