"""Tokens on their way to the host, which goes on meanwhile."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.engine.sampling import NO_NUMBER
from parallel.engine.sequence import TokenSequence
from parallel.engine.speculation.given import Given
from parallel.engine.speculation.tree_plan import TreePlan


class ModelError(RuntimeError):
    """What the model computes after a prompt is of no use.

    Args:
        index: the prompt's.
        name: what people find it by.
    """

    def __init__(self, index: int, name: str = "a prompt") -> None:
        super().__init__(
            f"after {name} the model gives no numbers (NaN, or infinity). Either they exceed what model.dtype holds, "
            "float16 above 65,504 (set model.dtype=bfloat16), or its files or a card are damaged (download the files "
            "again; check the cards with task=probe)."
        )
        self.index = index


@dataclass(frozen=True)
class Pending:
    """What `sequences` got from a decode step or after a prefill; `wait` has it. `tokens` are as Engine.step's.

    `arrived`: what a card passes once they are on the host, or when they were, where the host computed them itself.
    """

    sequences: list[TokenSequence]
    tokens: Tensor
    arrived: torch.cuda.Event | float
    is_step: bool
    # Of the trees that the step checked, where they are chosen step by step.
    plan: TreePlan | None = None

    @classmethod
    def fetch(
        cls, sequences: list[TokenSequence], tokens: Tensor, *, is_step: bool, plan: TreePlan | None = None
    ) -> Pending:
        if tokens.device.type == "cpu":
            return cls(sequences, tokens.clone(), time.perf_counter(), is_step, plan)
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(sequences, host, arrived, is_step, plan)

    def wait(self) -> tuple[list[Given], float]:
        """What each sequence got, and when it was there (time.perf_counter)."""
        if isinstance(self.arrived, float):
            return self._given(), self.arrived
        self.arrived.synchronize()
        return self._given(), time.perf_counter()

    def _given(self) -> list[Given]:
        if self.tokens.dim() == 1:
            return [Given([token]) for token in self.tokens.tolist()]
        return [Given.read(row) for row in self.tokens.tolist()]


def check_number(sequence: TokenSequence, given: Given) -> None:
    """Raises ModelError: the model gave no numbers to draw from."""
    if given.tokens == [NO_NUMBER]:
        raise ModelError(sequence.index)
