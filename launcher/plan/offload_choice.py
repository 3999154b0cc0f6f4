"""How many layers a run streams, where those lie, and where their keys and values do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

from launcher.config import RunConfig, SpeculationKind
from launcher.config.offload import KVPlace, OffloadKind
from launcher.hardware.inventory import Inventory
from launcher.memory.demand import Demand
from launcher.memory.fit import fits, largest
from launcher.memory.kv import host_kv_bytes_per_token
from launcher.plan.limits import KEPT_FREE_STREAMED, context_limit, wanted_context
from launcher.plan.offload_disk import has_host_room, place_layers
from launcher.plan.topology import PlanError
from parallel.footprint import host_refusal

# Whether keys and values of layers in host memory may lie there, too.
KV_ON_HOST = {KVPlace.card: (False,), KVPlace.host: (True,), KVPlace.auto: (False, True)}


def stream_layers(run: RunConfig, demand: Demand, budgets: tuple[int, ...], inventory: Inventory) -> Demand:
    """`demand` with as many layers in host memory, and on the disk, as the run must have there, and their keys and
    values where offload.kv says."""
    limit, _ = context_limit(demand.shape, demand.draft_shape)
    needed = run.engine.max_context or run.needed_tokens
    wanted = run.engine.max_context or wanted_context(run, limit, is_streamed=True)
    demands = []
    # offload.disk is for hosts that have no room for keys and values.
    for kv_on_host in KV_ON_HOST[run.offload.kv] if run.offload.disk is None else (False,):
        placed = replace(demand, kv_on_host=kv_on_host)
        num_streamed = choose_num_streamed(run, placed, budgets, inventory, needed, wanted, KEPT_FREE_STREAMED)
        demands.append(place_layers(run, placed, inventory, num_streamed))
    return choose_kv_place(run, demands, budgets, inventory, needed, wanted)


def choose_num_streamed(
    run: RunConfig,
    demand: Demand,
    budgets: tuple[int, ...],
    inventory: Inventory,
    needed: int,
    wanted: int,
    kept_free: float,
) -> int:
    """How many layers to stream: none where the run fits without, or may not; else the fewest that make it fit.

    Args:
        needed: tokens of a sequence without which the run cannot be; `wanted`: those to make room for, if some number
            of layers does, and as far as host memory has room for them.
        kept_free: share of each budget that stays unused.

    Raises:
        PlanError: offload.resident_layers exceeds the layers of the model.
    """
    num_layers, resident = demand.shape.num_layers, run.offload.resident_layers
    if resident is not None:
        if resident > num_layers:
            raise PlanError(f"offload.resident_layers={resident} exceeds the model's {num_layers} layers. Lower it.")
        return num_layers - resident
    if not MUST_STREAM[run.offload.enabled](demand, budgets, needed):
        return 0
    room = tuple(round(budget * (1 - kept_free)) for budget in budgets)
    place = cache(partial(place_layers, run, demand, inventory))

    def fewest(tokens: int) -> int | None:
        return next((num for num in range(1, num_layers + 1) if fits(place(num), room, tokens)), None)

    wished = fewest(wanted) or fewest(needed) or num_layers
    possible = largest(lambda num: has_host_room(run, place(num), inventory), wished)
    return possible if possible and fits(place(possible), budgets, needed) else wished


def choose_kv_place(
    run: RunConfig,
    demands: Sequence[Demand],
    budgets: tuple[int, ...],
    inventory: Inventory,
    needed: int,
    wanted: int,
) -> Demand:
    """Of those with keys and values in one place or another, the first whose steps copy least.

    That is of those with room for sequences of `wanted` tokens, or else `needed`; the first where none has that.
    """
    for tokens in (wanted, needed):
        possible = [
            each for each in demands if fits(each, budgets, tokens) and has_host_room(run, each, inventory, tokens)
        ]
        if possible:
            return min(possible, key=partial(_step_bytes, run))
    return demands[0]


def _step_bytes(run: RunConfig, demand: Demand) -> int:
    """What a step copies to the rank that gets most. With drafts the host does not know how far sequences have come."""
    is_known = run.speculation.kind == SpeculationKind.none
    num_tokens = run.attended_tokens if is_known else run.workload.batch_size * run.needed_tokens
    num_layers = demand.num_streamed - demand.num_disk
    sizes = zip(demand.layer_bytes, host_kv_bytes_per_token(demand), strict=True)
    return max(num_layers * layer_bytes + num_tokens * token_bytes for layer_bytes, token_bytes in sizes)


def refused_by_host(run: RunConfig, demand: Demand) -> str | None:
    """What it computes, where it is to compute layers and these are none; None otherwise."""
    if not run.offload.host_layers or demand.device != "cuda":
        return None
    scheme = demand.shape.scheme
    return "only linears of 4 bits" if scheme is None else host_refusal(scheme, demand.dtype)


def weights_exceed(demand: Demand, budgets: tuple[int, ...], needed: int) -> bool:
    """Whether those alone are too much for a single card."""
    return demand.device == "cuda" and demand.world_size == 1 and sum(demand.fixed_lines()[0].values()) > budgets[0]


def run_exceeds(demand: Demand, budgets: tuple[int, ...], needed: int) -> bool:
    return not fits(demand, budgets, needed)


def never(demand: Demand, budgets: tuple[int, ...], needed: int) -> bool:
    return False


MUST_STREAM: dict[OffloadKind, Callable[[Demand, tuple[int, ...], int], bool]] = {
    OffloadKind.auto: weights_exceed,
    OffloadKind.on: run_exceeds,
    OffloadKind.off: never,
}
