"""What the rows of a decode step hold on the device, where a captured graph reads and advances it."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.engine.decoder import Tokens
from parallel.engine.limits import PAGE_SIZE
from parallel.engine.sequence import Sequence


@dataclass(frozen=True)
class Rows:
    """Row by row: the newest token, its position, 1 where a sequence is in the row, its key, and its pages.

    Shapes: [rows] int64, and `block_table` [rows, pages of the longest context] int32. Rows without a sequence write to
    page 0, which belongs to none, and read nothing.
    """

    tokens: Tensor
    positions: Tensor
    active: Tensor
    keys: Tensor
    block_table: Tensor

    @classmethod
    def empty(cls, num_rows: int, num_pages: int, device: torch.device) -> Rows:
        tokens, positions, active, keys = torch.zeros(4, num_rows, dtype=torch.int64, device=device)
        table = torch.zeros(num_rows, num_pages, dtype=torch.int32, device=device)
        return cls(tokens, positions, active, keys, table)

    def first(self, num_rows: int) -> Rows:
        """A view of the first rows."""
        return Rows(*(column[:num_rows] for column in self.columns()))

    def columns(self) -> tuple[Tensor, ...]:
        return self.tokens, self.positions, self.active, self.keys, self.block_table

    def inputs(self) -> Tokens:
        """The newest tokens as the model takes them."""
        pages = self.block_table.gather(1, (self.positions // PAGE_SIZE).unsqueeze(1)).squeeze(1)
        slots = (pages * PAGE_SIZE + self.positions % PAGE_SIZE) * self.active
        return Tokens(self.tokens, self.positions, slots)

    def lengths(self) -> Tensor:
        """[rows] int32: tokens of each sequence in the cache once the newest is; 0 in rows without one."""
        return ((self.positions + 1) * self.active).to(torch.int32)

    def advance(self, sampled: Tensor) -> None:
        """Takes the tokens [rows] that followed, in place."""
        self.tokens.copy_(torch.where(self.active == 1, sampled, self.tokens))
        self.positions.add_(self.active)

    def arrange(self, sequences: Ordered[Sequence], sources: Ordered[int], tokens: Tensor) -> None:
        """Puts `sequences` into the first rows, in order, and none into the others.

        Args:
            sources: where in `tokens` the newest token of each sequence is.
        """
        num_rows, num_pages = self.block_table.shape
        table = torch.zeros(num_rows, 4 + num_pages, dtype=torch.int64)
        for row, (sequence, source) in enumerate(zip(sequences, sources, strict=True)):
            table[row, :4] = torch.tensor([source, sequence.next_position, 1, sequence.key])
            table[row, 4 : 4 + len(sequence.pages)] = torch.tensor(sequence.pages)
        table = to_device(table, self.tokens.device)
        self.tokens.copy_(tokens[table[:, 0]])
        for column, values in zip(self.columns()[1:4], table[:, 1:4].unbind(1), strict=True):
            column.copy_(values)
        self.block_table.copy_(table[:, 4:])


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
