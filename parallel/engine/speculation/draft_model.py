"""Drafts by a small model of the same tokenizer, sharded over the ranks as the large one is.

Sharded, since the cards have neither the memory nor the time for all of it: of a model of 1B in bf16 a step would read
2.5 GB on each card, num_drafts times, while its all-reduces are small. It has pages of its own, under the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.engine.rows import Rows
from parallel.engine.speculation.drafter import ModelDrafter


@dataclass(frozen=True)
class DraftModel(ModelDrafter):
    """Draws a draft after the other, with the same noise as the large model's draw at that place (see Speculator)."""

    num_drafts: int

    def propose(self, rows: Rows, history: Tensor) -> Tensor:
        """[rows, num_drafts] int64.

        The first pass takes the newest token and the one before: where the step before kept all its drafts, the last
        of them has not been through this model.
        """
        before = history.gather(1, (rows.positions - 1).clamp(min=0).unsqueeze(1)).long()
        drafts = [self._next(rows.spread(torch.cat([before, rows.tokens.unsqueeze(1)], dim=1), -1), 2)]
        for offset in range(1, self.num_drafts):
            drafts.append(self._next(rows.spread(drafts[-1].unsqueeze(1), offset), 1))
        return torch.stack(drafts, dim=1)

    def _next(self, rows: Rows, num: int) -> Tensor:
        """What follows the last of each `num` rows: [rows / num]."""
        known = replace(rows, tokens=self.sampler.readable(rows.tokens))
        last = slice(num - 1, None, num)
        logits = self.model.decoder.logits(self.model.row_states(known)[last])
        return self.sampler(logits, known.keys[last], known.positions[last] + 1)
