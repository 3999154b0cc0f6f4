"""What a step with drafts gives to each row, as one tensor that the host reads once it has arrived."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from parallel.engine.speculation.token_tree import NO_TOKEN


@dataclass(frozen=True)
class Given:
    """What a step gave to a sequence: tokens, and of how many drafts (None: there was no speculation)."""

    tokens: list[int]
    num_drafts: int | None = None
    # Places in the tree of the drafts among them.
    nodes: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, row: list[int]) -> Given:
        """From a row of `empty_given`."""
        middle = len(row) // 2 + 1
        tokens, nodes = ([each for each in part if each != NO_TOKEN] for part in (row[1:middle], row[middle:]))
        return cls(tokens, row[0], nodes)


def empty_given(num_rows: int, num_drafts: int, device: torch.device) -> Tensor:
    """[rows, 2 + 2 * num_drafts] int64. Of each row: how many drafts it had that could be accepted; up to
    1 + num_drafts tokens, then NO_TOKEN; places in the tree of the drafts among them, in a chain from 1 on, then
    NO_TOKEN."""
    return torch.zeros(num_rows, 2 + 2 * num_drafts, dtype=torch.int64, device=device)


def put_given(given: Tensor, num_drafts: Tensor, tokens: Tensor, nodes: Tensor, counts: Tensor) -> None:
    """Writes to `given` [rows, 2 + 2 * n], an empty_given's, in place.

    `num_drafts` [rows]; of `tokens` and `nodes` [rows, 1 + n] the first `counts` [rows] came true, the newest token's
    node ahead of those of the drafts.
    """
    width = tokens.shape[1]
    is_none = torch.arange(width, device=tokens.device) >= counts.unsqueeze(1)
    given[:, 0] = num_drafts
    given[:, 1 : 1 + width] = tokens.masked_fill(is_none, NO_TOKEN)
    given[:, 1 + width :] = nodes.masked_fill(is_none, NO_TOKEN)[:, 1:]
