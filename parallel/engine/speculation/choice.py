"""Which drafts an engine gets: by kind, as chains or as trees."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from parallel.engine.limits import EngineLimits
from parallel.engine.paged_model import PagedModel, open_paged
from parallel.engine.sampling import Sampler, open_sampler
from parallel.engine.speculation.draft_model import DraftModel
from parallel.engine.speculation.ngram import NgramDrafter
from parallel.engine.speculation.speculator import Drafter, Speculation, Speculator
from parallel.engine.speculation.tree_draft import TreeDraftModel
from parallel.engine.speculation.tree_ngram import NgramTrees
from parallel.engine.speculation.tree_speculator import TreeDrafter, TreeSpeculator

Made = TypeVar("Made")


def open_speculator(
    speculation: Speculation,
    limits: EngineLimits,
    sampler: Sampler,
    target: PagedModel,
    kv_dtype: torch.dtype | None,
    device: torch.device,
) -> Speculator | TreeSpeculator:
    """For an engine of the model `target` that picks its tokens with `sampler`.

    Raises:
        ValueError: an unknown kind; the message lists the known ones.
    """
    ngrams = (speculation.ngram_max, speculation.ngram_min)
    draft = partial(open_draft, speculation, limits, sampler, kv_dtype, device)
    num, plan = speculation.num_drafts, speculation.tree
    if plan is None:
        chains: dict[str, Callable[[], Drafter]] = {
            "ngram": lambda: NgramDrafter(num, *ngrams),
            "draft": lambda: DraftModel(*draft(), num),
        }
        return Speculator(choose(chains, speculation.kind)(), num, limits, sampler, device)
    trees: dict[str, Callable[[], TreeDrafter]] = {
        "ngram": lambda: NgramTrees(plan, *ngrams),
        "draft": lambda: TreeDraftModel(*draft(), plan),
    }
    return TreeSpeculator(choose(trees, speculation.kind)(), plan, limits, sampler, target.caches, device)


def choose(kinds: dict[str, Made], kind: str) -> Made:
    if kind not in kinds:
        raise ValueError(f"speculation.kind={kind} is none of {', '.join(kinds)}.")
    return kinds[kind]


def open_draft(
    speculation: Speculation,
    limits: EngineLimits,
    sampler: Sampler,
    kv_dtype: torch.dtype | None,
    device: torch.device,
) -> tuple[PagedModel, Sampler]:
    model = speculation.draft
    assert model is not None, "speculation.kind=draft comes with a model"
    paged = open_paged(model, limits, kv_dtype, device)
    return paged, open_sampler(model, sampler.params, sampler.communicator)
