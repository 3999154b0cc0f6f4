"""Which drafts an engine gets: by kind, as chains or as trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from parallel.engine.limits import EngineLimits
from parallel.engine.paged_model import PagedModel, open_paged
from parallel.engine.sampling import Sampler, open_sampler
from parallel.engine.speculation.auto import AutoSpeculator
from parallel.engine.speculation.draft_model import DraftModel
from parallel.engine.speculation.drafter import Drafter
from parallel.engine.speculation.ngram import NgramDrafter
from parallel.engine.speculation.speculator import Speculation, Speculator
from parallel.engine.speculation.tree_draft import TreeDraftModel
from parallel.engine.speculation.tree_ngram import NgramTrees
from parallel.engine.speculation.tree_plan import TreePlan
from parallel.engine.speculation.tree_speculator import TreeDrafter, TreeSpeculator

Made = TypeVar("Made")


def open_speculator(
    speculation: Speculation,
    limits: EngineLimits,
    sampler: Sampler,
    target: PagedModel,
    kv_dtype: torch.dtype | None,
    device: torch.device,
) -> Speculator | TreeSpeculator | AutoSpeculator:
    """For an engine of the model `target` that picks its tokens with `sampler`.

    Raises:
        ValueError: an unknown kind; the message lists the known ones.
    """
    ngrams = (speculation.ngram_max, speculation.ngram_min)
    draft = partial(open_draft, speculation, limits, sampler, kv_dtype, device)
    num, plans = speculation.num_drafts, speculation.choices
    if speculation.tree is not None:
        plans = (speculation.tree,)
    if not plans:
        chains: dict[str, Callable[[], Drafter[torch.Tensor]]] = {
            "ngram": lambda: NgramDrafter(num, *ngrams),
            "draft": lambda: DraftModel(*draft(), num),
        }
        return Speculator(choose(chains, speculation.kind)(), num, limits, sampler, device)
    trees: dict[str, Callable[[], list[TreeDrafter]]] = {
        "ngram": lambda: [NgramTrees(plan, *ngrams) for plan in plans],
        "draft": lambda: draft_trees(*draft(), plans),
    }
    drafters = choose(trees, speculation.kind)()
    others = (limits, sampler, target.stored, device)
    if speculation.tree is not None:
        return TreeSpeculator(drafters[0], speculation.tree, *others)
    return AutoSpeculator(dict(zip(plans, drafters, strict=True)), *others)


def draft_trees(model: PagedModel, sampler: Sampler, plans: Sequence[TreePlan]) -> list[TreeDrafter]:
    """Of one model, a drafter for each plan."""
    return [TreeDraftModel(model, sampler, plan) for plan in plans]


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
