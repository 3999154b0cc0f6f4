"""Rows of a pass over trees of drafts: where a token lies in the cache is not its position in the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.engine.decoder import Tokens
from parallel.engine.rows import Rows, slots_at
from parallel.kernels.attention_reference import TreeMask


@dataclass(frozen=True)
class TreeRows:
    """Nodes of trees, those of a sequence next to one another: [sequences * nodes] each.

    All nodes of a sequence are cached, so that nothing in its length is arbitrary; those that are not `active`, having
    no token or a position behind the sequence's end, are seen by none.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    keys: Tensor
    active: Tensor
    block_table: Tensor
    lengths: Tensor
    mask: TreeMask

    def inputs(self) -> Tokens:
        return Tokens(self.tokens, self.positions, self.slots)

    def sequence_tables(self) -> Tensor:
        """[sequences, pages]"""
        return self.block_table

    def sequence_lengths(self) -> Tensor:
        """[sequences] int32: tokens of each in the cache once its nodes are."""
        return self.lengths

    def tree(self) -> TreeMask:
        return self.mask


def newest_places(rows: Rows) -> tuple[Tensor, Tensor]:
    """[rows] each: the newest token's position, kept inside the sequence, and 1 where that token is to be cached."""
    last = (rows.ends - 1).clamp(min=0)
    return torch.minimum(rows.positions, last), rows.active * (rows.positions < rows.ends)


def tree_rows(rows: Rows, tokens: Tensor, depths: Tensor, masks: Tensor, *, first: int, start: int) -> TreeRows:
    """Rows for nodes `tokens` [rows, n] int64, -1 where there is none, `depths` [rows, n] after the newest tokens.

    Args:
        masks: [rows, n, words] int64, as TreeMask's; of nodes from `start` slots after the newest token's on.
        first: slots between the newest token's and that of the first node here, which the others follow.
    """
    num = tokens.shape[1]
    newest, is_open = (each.unsqueeze(1) for each in newest_places(rows))
    positions, last = newest + depths, (rows.ends - 1).clamp(min=0).unsqueeze(1)
    active = is_open * (positions <= last) * (tokens >= 0)
    places = newest + first + torch.arange(num, device=tokens.device)
    mask = TreeMask(num, (newest.squeeze(1) + start).to(torch.int32), (masks * active.unsqueeze(2)).flatten(0, 1))
    return TreeRows(
        tokens=tokens.clamp(min=0).flatten(),
        positions=torch.minimum(positions, last).flatten(),
        slots=(slots_at(rows.block_table, places) * is_open).flatten(),
        keys=rows.keys.repeat_interleave(num),
        active=active.flatten(),
        block_table=rows.block_table,
        lengths=((newest + first + num) * is_open).squeeze(1).to(torch.int32),
        mask=mask,
    )
