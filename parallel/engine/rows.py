"""What the rows of a decode step hold on the device, where a captured graph reads and advances it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parallel.engine.decoder import Tokens
from parallel.engine.sequence import TokenSequence
from parallel.kernels.attention_reference import TreeMask
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.node_bits import chain_masks


@dataclass(frozen=True)
class Rows:
    """Row by row: the newest token, its position, 1 where a sequence is in the row, its key, the position that none of
    its tokens in the cache reaches, and its pages.

    Shapes: [rows] int64, and `block_table` [rows, pages of the longest context] int32. Rows without a sequence write to
    page 0, which belongs to none, and read nothing. With more than one of `rows_per_sequence`, rows of a sequence are
    next to one another, at positions that follow.
    """

    tokens: Tensor
    positions: Tensor
    active: Tensor
    keys: Tensor
    ends: Tensor
    block_table: Tensor
    rows_per_sequence: int = field(default=1, kw_only=True)

    @classmethod
    def empty(cls, num_rows: int, num_pages: int, device: torch.device) -> Rows:
        tokens, positions, active, keys, ends = torch.zeros(5, num_rows, dtype=torch.int64, device=device)
        table = torch.zeros(num_rows, num_pages, dtype=torch.int32, device=device)
        return cls(tokens, positions, active, keys, ends, table)

    def first(self, num_rows: int) -> Rows:
        """A view of the first rows."""
        return Rows(*(column[:num_rows] for column in self.columns()))

    def columns(self) -> tuple[Tensor, ...]:
        return self.tokens, self.positions, self.active, self.keys, self.ends, self.block_table

    def inputs(self) -> Tokens:
        """The newest tokens as the model takes them."""
        slots = slots_at(self.block_table, self.positions.unsqueeze(1)).squeeze(1) * self.active
        return Tokens(self.tokens, self.positions, slots)

    def lengths(self) -> Tensor:
        """[rows] int32: tokens of each sequence in the cache once the newest is; 0 in rows without one."""
        return ((self.positions + 1) * self.active).to(torch.int32)

    def sequence_tables(self) -> Tensor:
        """[sequences, pages]"""
        return self.block_table[:: self.rows_per_sequence]

    def sequence_lengths(self) -> Tensor:
        """[sequences] int32: tokens of each in the cache once those of all its rows are."""
        return self.lengths().view(-1, self.rows_per_sequence).amax(1)

    def tree(self) -> TreeMask | None:
        """What rows of one sequence see of each other: those before. None where there is one a sequence.

        Rows that `spread` put before a sequence's start stand at its first token, as the first that is inside does.
        """
        num = self.rows_per_sequence
        if num == 1:
            return None
        nodes = self.positions - self.positions[::num].repeat_interleave(num)
        masks = chain_masks(num, self.active.device)[nodes] * self.active.unsqueeze(1)
        return TreeMask(num, self.positions[::num].to(torch.int32), masks)

    def advance(self, newest: Tensor, counts: Tensor) -> None:
        """Takes the last of the `counts` [rows] tokens that followed, `newest` [rows], in place; 0 leaves a row."""
        self.tokens.copy_(torch.where(counts > 0, newest, self.tokens))
        self.positions.add_(counts)

    def spread(self, tokens: Tensor, offset: int) -> Rows:
        """A row for each of `tokens` [rows, n], of the positions of their sequence from its newest token's + `offset`.

        They are active where such a token of the sequence is to be cached.
        """
        num = tokens.shape[1]
        offsets = torch.arange(offset, offset + num, device=tokens.device)
        positions = self.positions.unsqueeze(1) + offsets
        ends = self.ends.unsqueeze(1)
        active = ((positions >= 0) & (positions < ends)) * self.active.unsqueeze(1)
        # Where cosines and pages are looked up, for nothing.
        positions = torch.minimum(positions, ends - 1).clamp(min=0)
        repeated = (column.repeat_interleave(num, dim=0) for column in (self.keys, self.ends, self.block_table))
        return Rows(tokens.flatten(), positions.flatten(), active.flatten(), *repeated, rows_per_sequence=num)

    def arrange(
        self, sequences: Sequence[TokenSequence], sources: Sequence[int], tokens: Tensor, positions: Tensor
    ) -> None:
        """Puts `sequences` into the first rows, in order, and none into the others.

        Args:
            sources: where in `tokens` and `positions` those of each sequence are.
        """
        num_rows, num_pages = self.block_table.shape
        table = torch.zeros(num_rows, 4 + num_pages, dtype=torch.int64)
        for row, (sequence, source) in enumerate(zip(sequences, sources, strict=True)):
            table[row, :4] = torch.tensor([source, 1, sequence.key, sequence.num_tokens])
            table[row, 4 : 4 + len(sequence.pages)] = torch.tensor(sequence.pages)
        table = to_device(table, self.tokens.device)
        sources_there, active, keys, ends = table[:, :4].unbind(1)
        values = (tokens[sources_there], positions[sources_there] * active, active, keys, ends, table[:, 4:])
        for column, new in zip(self.columns(), values, strict=True):
            column.copy_(new)


def slots_at(block_table: Tensor, places: Tensor) -> Tensor:
    """[rows, n]: the slots of the tokens at `places` [rows, n] int64 of sequences with the pages [rows, pages]."""
    return block_table.gather(1, places // PAGE_SIZE) * PAGE_SIZE + places % PAGE_SIZE


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
