"""What drafters have in common: those that ask a model, and those that look at the tokens there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parallel.engine.paged_model import PagedModel
from parallel.engine.rows import Rows
from parallel.engine.sampling import Sampler
from parallel.engine.sequence import Part
from parallel.engine.speculation.token_tree import TokenTree
from parallel.engine.speculation.tree_plan import TAKEN_IN
from parallel.kernels.pages import PagedKV

Drafts_co = TypeVar("Drafts_co", Tensor, TokenTree, covariant=True)


class Drafter(Protocol[Drafts_co]):
    @property
    def models(self) -> list[PreTrainedModel]:
        """Those that it runs."""
        ...

    @property
    def caches(self) -> list[PagedKV]:
        """Pages of its models, layer by layer."""
        ...

    def prefill(self, parts: Sequence[Part]) -> None:
        """Takes in parts of prompts that the model has taken in."""
        ...

    def propose(self, rows: Rows, history: Tensor) -> Drafts_co:
        """What may follow each row's newest token: [rows, num_drafts] int64, NO_TOKEN for no draft, or trees.

        Args:
            history: [rows, width] token ids of the sequences, the newest at its position.
        """
        ...


@dataclass(frozen=True)
class ModelDrafter:
    """Goes through a model with a cache of its own."""

    model: PagedModel
    sampler: Sampler

    @property
    def models(self) -> list[PreTrainedModel]:
        return [self.model.decoder.model]

    @property
    def caches(self) -> list[PagedKV]:
        return self.model.caches

    def prefill(self, parts: Sequence[Part]) -> None:
        self.model.part_states(parts)

    def take_in(self, rows: Rows, history: Tensor, num: int) -> None:
        """Caches, of each row's sequence, the `num` tokens or more before its newest two, with which drafts begin.

        All passes are of one shape, for which kernels are compiled once.

        Args:
            history: as of Drafter.propose.
        """
        num_passes = -(-min(num, history.shape[1]) // TAKEN_IN)
        for start in range(-1 - num_passes * TAKEN_IN, -1, TAKEN_IN):
            offsets = torch.arange(start, start + TAKEN_IN, device=history.device)
            places = (rows.positions.unsqueeze(1) + offsets).clamp(min=0)
            tokens = self.sampler.readable(history.gather(1, places).long())
            self.model.row_states(rows.spread(tokens, start))


class HistoryDrafter:
    """Needs nothing but the tokens of the sequences."""

    @property
    def models(self) -> list[PreTrainedModel]:
        return []

    @property
    def caches(self) -> list[PagedKV]:
        return []

    def prefill(self, parts: Sequence[Part]) -> None:
        """Prompts are in the history."""
