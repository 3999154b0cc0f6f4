"""Paged attention in plain torch: what a CPU runs, and cards with what the kernel refuses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.node_bits import WORD_BITS
from parallel.kernels.pages import as_bits


@dataclass(frozen=True)
class TreeMask:
    """Rows of one sequence that share what they read: each sees the tokens before the tree, and of the tree a choice.

    The tree's nodes are the sequence's tokens from `starts` on, at most MAX_NODES, in the order of the cache. Bit i of
    a row's mask: it sees node i; mostly its ancestors and itself. Nodes that masks have no bits for are seen by none. A
    row of mask 0 is empty: zeros come out. What lies beyond the sequence's length is never seen.
    """

    rows_per_sequence: int
    # [sequences] int32: tokens before the tree.
    starts: Tensor
    # [sequences * rows_per_sequence, words] int64 (see node_bits.py), the rows of a sequence next to one another.
    masks: Tensor


def attend_gathered(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    starts: Tensor | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """See `paged_attention`; over all pages of `block_table`."""
    positions = torch.arange(block_table.shape[1] * PAGE_SIZE, device=query.device)
    present = positions < lengths.unsqueeze(1)
    # Unused slots may hold anything: as masked values they would still be multiplied by a weight of zero.
    absent = ~present[:, None, :, None]
    pages = block_table.masked_fill(~present[:, ::PAGE_SIZE], 0).long()

    def gather(stored: Tensor) -> Tensor:
        paged = as_bits(stored)[pages].view(stored.dtype).movedim(2, 1)
        return paged.flatten(2, 3).to(torch.float32).masked_fill(absent, 0)

    # [sequences, 1, rows, 1, tokens]
    seen = visible(present, positions, starts, masks)[:, None, :, None]
    rows = query.unflatten(0, (len(lengths), -1)).unflatten(2, (keys.shape[1], -1)).movedim(1, 2).to(torch.float32)
    scores = (rows.flatten(2, 3) @ gather(keys).transpose(2, 3) * scale).unflatten(2, rows.shape[2:4])
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    attended = (weights.flatten(2, 3) @ gather(values)).unflatten(2, rows.shape[2:4])
    attended = attended.masked_fill(~seen.any(-1, keepdim=True), 0)
    return attended.movedim(2, 1).reshape(query.shape).to(query.dtype)


def visible(present: Tensor, positions: Tensor, starts: Tensor | None, masks: Tensor | None) -> Tensor:
    """[sequences, rows, tokens]: which of the tokens `present` [sequences, tokens] a row sees."""
    if starts is None or masks is None:
        return present.unsqueeze(1)
    masks = masks.unflatten(0, (len(starts), -1))
    nodes, num_bits = positions - starts.unsqueeze(1), masks.shape[2] * WORD_BITS
    known = nodes.clamp(0, num_bits - 1)
    words = masks.gather(2, (known // WORD_BITS).unsqueeze(1).expand(-1, masks.shape[1], -1))
    chosen = (words >> (known % WORD_BITS).unsqueeze(1) & 1).bool() & (nodes < num_bits).unsqueeze(1)
    is_row = (masks != 0).any(2, keepdim=True)
    return present.unsqueeze(1) & ((nodes < 0).unsqueeze(1) | chosen) & is_row
