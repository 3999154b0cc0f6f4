"""How many tokens a sequence may have: what was asked for, or what fits."""

from __future__ import annotations

from dataclasses import replace

from launcher.config import RunConfig
from launcher.hardware.inventory import Inventory
from launcher.memory.demand import Demand
from launcher.memory.fit import fits, largest_context
from launcher.plan.limits import KEPT_FREE, KEPT_FREE_STREAMED, context_limit, wanted_context
from launcher.plan.offload_disk import has_host_room, largest_host_context
from launcher.plan.refusal import refuse_memory
from launcher.plan.remedies import Refused
from launcher.plan.topology import PlanError
from parallel.kernels.limits import PAGE_SIZE
from parallel.offload.spread import NUM_STAGED


def choose_context(run: RunConfig, demand: Demand, budgets: tuple[int, ...], inventory: Inventory) -> tuple[int, str]:
    """Tokens of a sequence and a sentence that says why so many.

    Raises:
        PlanError: those that were asked for exceed the model's limit, or do not fit the cards.
    """
    limit, limit_reason = context_limit(demand.shape, demand.draft_shape)
    needed = run.needed_tokens
    asked = run.engine.max_context
    if asked is not None:
        _check_limit(f"engine.max_context={asked}", asked, limit, limit_reason, "Lower it.")
        if not fits(demand, budgets, asked):
            raise refuse_memory(Refused(run, demand, budgets, inventory, asked))
        return asked, "engine.max_context was set."
    workload = f"workload.prompt_tokens + workload.output_tokens = {needed}"
    _check_limit(workload, needed, limit, limit_reason, "Lower workload.output_tokens or shorten the prompts.")
    is_streamed = demand.num_streamed > 0
    wanted = wanted_context(run, limit, is_streamed=is_streamed)
    if not fits(demand, budgets, needed):
        raise refuse_memory(Refused(run, demand, budgets, inventory, needed))
    kept_free = KEPT_FREE_STREAMED if is_streamed else KEPT_FREE
    room = tuple(round(budget * (1 - kept_free)) for budget in budgets)
    most = largest_context(demand, room, wanted)
    on_host = largest_host_context(run, demand, inventory, most)
    in_pages = max(on_host // PAGE_SIZE * PAGE_SIZE, needed)
    if on_host < most:
        return in_pages, "what host memory has room for (offload.kv=host)."
    if most < wanted:
        more = _fits_with_host(run, demand, room, inventory, in_pages + PAGE_SIZE)
        hint = "; offload.kv=host has room for more" if more else ""
        return in_pages, f"what fits beside the weights, with a little kept free{hint}."
    if wanted == limit:
        return wanted, f"{limit_reason}."
    if wanted == needed:
        return wanted, f"{workload}{'; room for more would stream more layers' if is_streamed else ''}."
    return wanted, f"the default{', until lengths of prompts are known' if is_streamed else ''}."


def _fits_with_host(run: RunConfig, demand: Demand, room: tuple[int, ...], inventory: Inventory, tokens: int) -> bool:
    """Whether sequences of so many fit where keys and values of streamed layers may go to host memory and do."""
    hosted = replace(demand, kv_on_host=True)
    if run.offload.disk is not None or hosted.num_kv_hosted - demand.num_kv_hosted <= NUM_STAGED:
        return False
    return fits(hosted, room, tokens) and has_host_room(run, hosted, inventory, tokens)


def _check_limit(what: str, tokens: int, limit: int, limit_reason: str, remedy: str) -> None:
    if tokens > limit:
        raise PlanError(f"{what} exceeds {limit_reason}. {remedy}")
