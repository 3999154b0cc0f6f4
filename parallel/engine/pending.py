"""Tokens on their way to the host, which goes on meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.engine.sequence import Sequence


@dataclass(frozen=True)
class Pending:
    """The newest token of each of `sequences`, of a decode step or after a prefill; `wait` has them."""

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

    def wait(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        tokens: list[int] = self.tokens.tolist()
        return tokens
