"""The tokens of every sequence on the device, where drafts are made from them without the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.engine.rows import Rows, to_device
from parallel.engine.sequence import TokenSequence


@dataclass(frozen=True)
class History:
    """`tokens` [rows, max_context + 1] int32: prompt and answer, the newest token at its position; what follows it, and
    the last column, is arbitrary."""

    tokens: Tensor

    @classmethod
    def empty(cls, num_rows: int, max_context: int, device: torch.device) -> History:
        return cls(torch.zeros(num_rows, max_context + 1, dtype=torch.int32, device=device))

    def arrange(self, sources: Sequence[int], fresh: Sequence[TokenSequence], rows: Rows) -> None:
        """Follows `rows`, which have been arranged.

        Args:
            sources: for each of the first rows, the row it was before, or the number of rows + its place in `fresh`.
        """
        num_rows, width = self.tokens.shape
        prompts = torch.zeros(len(fresh), width, dtype=torch.int32)
        for prompt, sequence in zip(prompts, fresh, strict=True):
            prompt[: len(sequence.prompt)] = torch.tensor(sequence.prompt)
        device = self.tokens.device
        places = to_device(torch.tensor([*sources, *[0] * (num_rows - len(sources))]), device)
        self.tokens.copy_(torch.cat([self.tokens, to_device(prompts, device)])[places])
        self.tokens.scatter_(1, rows.positions.unsqueeze(1), rows.tokens.unsqueeze(1).int())

    def append(self, positions: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """Adds the first `counts` [n] of `tokens` [n, m] after `positions` [n] in the first n rows."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        targets = positions.unsqueeze(1) + 1 + places
        targets = torch.where(places < counts.unsqueeze(1), targets, self.tokens.shape[1] - 1)
        self.tokens[: len(tokens)].scatter_(1, targets, tokens.int())
