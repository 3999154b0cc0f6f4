"""Tokens on their way to the host, which goes on meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.engine.sequence import Sequence


@dataclass(frozen=True)
class Given:
    """What a step gave to a sequence: tokens, and of how many drafts (None: there was no speculation)."""

    tokens: list[int]
    num_drafts: int | None = None

    @classmethod
    def read(cls, row: list[int]) -> Given:
        """From a row of Speculator.given."""
        return cls([token for token in row[1:] if token >= 0], row[0])


@dataclass(frozen=True)
class Pending:
    """What `sequences` got from a decode step or after a prefill; `wait` has it. `tokens` are as Engine.step's."""

    sequences: list[Sequence]
    tokens: Tensor
    arrived: torch.cuda.Event | None
    is_step: bool

    @classmethod
    def fetch(cls, sequences: list[Sequence], tokens: Tensor, *, is_step: bool) -> Pending:
        if tokens.device.type == "cpu":
            return cls(sequences, tokens.clone(), None, is_step)
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(sequences, host, arrived, is_step)

    def wait(self) -> list[Given]:
        if self.arrived is not None:
            self.arrived.synchronize()
        if self.tokens.dim() == 1:
            return [Given([token]) for token in self.tokens.tolist()]
        return [Given.read(row) for row in self.tokens.tolist()]
