"""What drafters have in common: those that ask a model, and those that look at the tokens there are."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass

from transformers import PreTrainedModel

from parallel.engine.paged_model import PagedModel, Part
from parallel.engine.pages import PagedKV
from parallel.engine.sampling import Sampler


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

    def prefill(self, parts: Ordered[Part]) -> None:
        self.model.part_states(parts)


class HistoryDrafter:
    """Needs nothing but the tokens of the sequences."""

    @property
    def models(self) -> list[PreTrainedModel]:
        return []

    @property
    def caches(self) -> list[PagedKV]:
        return []

    def prefill(self, parts: Ordered[Part]) -> None:
        """Prompts are in the history."""
