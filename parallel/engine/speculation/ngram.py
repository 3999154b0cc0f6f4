"""Drafts by looking up: what followed the last few tokens when they last stood in the sequence, prompt or answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.engine.rows import Rows
from parallel.engine.speculation.drafter import HistoryDrafter
from parallel.engine.speculation.token_tree import NO_TOKEN


@dataclass(frozen=True)
class NgramDrafter(HistoryDrafter):
    """Looks up the last `longest` tokens, and fewer, down to `shortest`, where those are nowhere."""

    num_drafts: int
    longest: int
    shortest: int

    def propose(self, rows: Rows, history: Tensor) -> Tensor:
        """[rows, num_drafts] int64 from the sequences' tokens [rows, width]; NO_TOKEN without anything to go by."""
        return look_up(history, rows.positions, self.num_drafts, self.longest, self.shortest)


def look_up(history: Tensor, newest: Tensor, num_drafts: int, longest: int, shortest: int) -> Tensor:
    """Drafts of each row, all or none (NO_TOKEN): [rows, num_drafts] int64; the best of `continuations`."""
    return continuations(history, newest, num_drafts, longest, shortest, 1).squeeze(1)


def continuations(
    history: Tensor, newest: Tensor, num_drafts: int, longest: int, shortest: int, num_matches: int
) -> Tensor:
    """What followed the best matches, the best first, each all or none (NO_TOKEN): [rows, num_matches, num_drafts]
    int64.

    The longest match wins, then the latest. Where it reaches into the last tokens themselves, the text has a period,
    which goes on. Shapes are static.

    Args:
        history: [rows, width] token ids, of which those up to `newest` [rows] count.
    """
    width = history.shape[1]
    ends = torch.arange(width, device=history.device)
    # Whether, and then how far back, the text that ends at each place is the text that ends at the newest token.
    same = ends < newest.unsqueeze(1)
    lengths = torch.zeros_like(history)
    for back in range(min(longest, width)):
        last = history.gather(1, (newest - back).clamp(min=0).unsqueeze(1))
        equal = torch.zeros_like(same)
        equal[:, back:] = history[:, : width - back] == last
        same = same & equal
        lengths += same
    score, place = (lengths * (lengths >= shortest) * width + ends).topk(num_matches)
    newest = newest.view(-1, 1, 1)
    period = (newest - place.unsqueeze(2)).clamp(min=1)
    offsets = 1 - period + torch.arange(num_drafts, device=history.device) % period
    drafts = history.gather(1, (newest + offsets).clamp(min=0).flatten(1)).view(offsets.shape).long()
    return drafts.masked_fill((score < width).unsqueeze(2), NO_TOKEN)
