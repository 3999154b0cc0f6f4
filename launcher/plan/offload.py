"""Which layers a run streams from host memory or the disk, what that takes there, and how long it makes a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from launcher.config import RunConfig, SpeculationKind, WeightsKind
from launcher.config.offload import KVPlace, OffloadKind
from launcher.hardware.inventory import Card, Inventory
from launcher.memory.demand import Demand
from launcher.memory.fit import fits, largest
from launcher.memory.kv import host_kv_bytes, host_kv_bytes_per_token
from launcher.memory.streamed import disk_bytes, ring_bytes
from launcher.plan.context import KEPT_FREE_STREAMED
from launcher.plan.offload_disk import (
    DiskRate,
    disk_rate,
    fewest_on_disk,
    free_host_bytes,
    has_host_room,
    largest_host_context,
    needed_host_bytes,
    pack_ms,
    place_layers,
    places,
)
from launcher.plan.refusal import refuse_host_memory
from launcher.plan.remedies import Refused, shorter_sequences
from launcher.plan.topology import PlanError
from parallel.footprint import host_refusal

# What copies from pinned memory reach, by PCIe generation, over 16 lanes: 55 measured on an H200 (5.0); 25 and 12.4 are
# usual of 4.0 and 3.0, 0.8 of what the lanes carry.
COPY_GB_PER_SEC = {3: 12.4, 4: 25.0, 5: 55.0}
FULL_LANES = 16
# Whether keys and values of layers in host memory may lie there, too.
KV_ON_HOST = {KVPlace.card: (False,), KVPlace.host: (True,), KVPlace.auto: (False, True)}
# One token of prompt and one of answer.
MIN_CONTEXT = 2


@dataclass(frozen=True)
class OffloadPlan:
    """Layers that lie in host memory, and on the disk; `reason` says why they do."""

    streamed_layers: tuple[int, ...]
    resident_layers: int
    reason: str
    # On each rank: of host memory, for these layers and the embedding; and what of it a pass copies to the card.
    host_bytes: tuple[int, ...]
    pass_bytes: tuple[int, ...]
    # Of each rank's link, predicted; None where its generation is not known.
    copy_gb_per_sec: tuple[float | None, ...]
    # Whether the host computes some of these layers if a trial shows that to be faster; then steps copy less.
    host_may_compute: bool = False
    # Of host memory, all ranks together with their processes; and what there is for them, where that is known.
    needed_host_bytes: int = 0
    free_host_bytes: int | None = None
    disk_layers: tuple[int, ...] = ()
    # On each rank: read from the disk in a pass, as the checkpoint has it; and of host memory, for reading ahead.
    disk_bytes: tuple[int, ...] = ()
    ring_bytes: tuple[int, ...] = ()
    # Of all ranks together.
    disk_rate: DiskRate | None = None
    # What a card takes to pack the layers from the disk, predicted; None where that cannot be told.
    pack_ms: float | None = None
    # On each rank, of keys and values in host memory: all, and of a token, which every pass copies that attends to it.
    # 0 where they are on the card.
    kv_host_bytes: tuple[int, ...] = ()
    kv_bytes_per_token: tuple[int, ...] = ()

    @property
    def pass_ms(self) -> float | None:
        """What the slowest takes of what goes on at once: a rank's copies, the disk, packing; None where a link is not
        known."""
        times_ms = [self.disk_ms or 0.0, self.pack_ms or 0.0]
        read = self.disk_bytes or (0,) * len(self.pass_bytes)
        for num_bytes, num_read, rate in zip(self.pass_bytes, read, self.copy_gb_per_sec, strict=True):
            if rate is None:
                return None
            times_ms.append((num_bytes + num_read) / (rate * 1e9) * 1e3)
        return max(times_ms)

    @property
    def kv_token_ms(self) -> float:
        """What the slowest link takes for each token that a pass attends to; 0 where it is not known."""
        rates = zip(self.kv_bytes_per_token, self.copy_gb_per_sec, strict=False)
        return max((size / (rate * 1e9) * 1e3 for size, rate in rates if rate), default=0.0)

    @property
    def disk_ms(self) -> float | None:
        """What the reads of a pass take, of all ranks; None without."""
        return None if self.disk_rate is None else sum(self.disk_bytes) / (self.disk_rate.gb_per_sec * 1e9) * 1e3


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
        needed: tokens of a sequence without which the run cannot be; `wanted`: those to make room for, as far as host
            memory has room for the layers.
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
    place = partial(place_layers, run, demand, inventory)
    wished = next((num for num in range(1, num_layers) if fits(place(num), room, wanted)), num_layers)
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
    sizes = zip(demand.layer_bytes(), host_kv_bytes_per_token(demand), strict=True)
    return max(num_layers * layer_bytes + num_tokens * token_bytes for layer_bytes, token_bytes in sizes)


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


def plan_offload(
    run: RunConfig, demand: Demand, budgets: tuple[int, ...], inventory: Inventory, max_context: int
) -> OffloadPlan | None:
    """What `demand.num_streamed` layers in host memory and on the disk mean; None where there are none.

    Raises:
        PlanError: host memory does not suffice; the message has the sizes. Or there are no files to read from.
    """
    if demand.num_streamed == 0:
        return None
    check_shared(run, demand)
    host_bytes, free_bytes = demand.host_bytes(), free_host_bytes(run, inventory)
    needed = needed_host_bytes(demand, max_context)
    if free_bytes is not None and needed > free_bytes:
        remedies = _kv_remedies(run, demand, budgets, inventory, max_context) + _disk_remedies(run, demand, inventory)
        refused = Refused(run, demand, budgets, inventory, run.engine.max_context or run.needed_tokens)
        raise refuse_host_memory(refused, max_context, needed, free_bytes, remedies)
    if demand.num_disk and run.model.weights == WeightsKind.dummy:
        raise PlanError(
            f"offload.disk={run.offload.disk} reads {demand.num_disk} layers from the checkpoint in every pass, and "
            "model.weights=dummy has none. Write one with tools.make_checkpoint, or lower what is streamed."
        )
    on_host, on_disk = places(demand)
    cards = inventory.cards[: demand.world_size]
    return OffloadPlan(
        streamed_layers=on_host,
        resident_layers=demand.shape.num_layers - demand.num_streamed,
        reason=_reason(run, demand, budgets, inventory),
        host_bytes=host_bytes,
        needed_host_bytes=needed,
        free_host_bytes=free_bytes,
        pass_bytes=tuple(len(on_host) * size for size in demand.layer_bytes()),
        copy_gb_per_sec=tuple(map(copy_gb_per_sec, cards)) or (None,) * len(host_bytes),
        host_may_compute=demand.host_computes,
        kv_host_bytes=host_kv_bytes(demand, max_context) if demand.num_kv_hosted else (0,) * demand.world_size,
        kv_bytes_per_token=host_kv_bytes_per_token(demand),
        **(_disk_part(run, demand, inventory, on_disk) if on_disk else {}),
    )


def check_shared(run: RunConfig, demand: Demand) -> None:
    """Raises PlanError: the host is to compute layers, and cannot."""
    if not run.offload.host_layers or demand.device != "cuda":
        return
    scheme = demand.shape.scheme
    why_not = "only linears of 4 bits" if scheme is None else host_refusal(scheme, demand.dtype)
    if why_not is not None:
        raise PlanError(
            f"offload.host_layers={run.offload.host_layers}: the host computes {why_not}. Leave it out, or set "
            "model.quantize=int4 for a checkpoint in 16 or 32 bits, and model.dtype=bfloat16."
        )


def _disk_part(run: RunConfig, demand: Demand, inventory: Inventory, on_disk: tuple[int, ...]) -> dict[str, Any]:
    return {
        "disk_layers": on_disk,
        "disk_bytes": disk_bytes(demand),
        "ring_bytes": ring_bytes(demand),
        "disk_rate": disk_rate(run, inventory),
        "pack_ms": pack_ms(demand, inventory.cards[: demand.world_size]),
    }


def _kv_remedies(
    run: RunConfig, demand: Demand, budgets: tuple[int, ...], inventory: Inventory, max_context: int
) -> list[str]:
    """Fewer tokens there, or none."""
    if not demand.num_kv_hosted:
        return []
    most = largest_host_context(run, demand, inventory, max_context)
    shorter = [shorter_sequences(run, most)] if most >= MIN_CONTEXT else []
    on_card = replace(demand, kv_on_host=False)
    is_possible = has_host_room(run, on_card, inventory) and fits(on_card, budgets, max_context)
    return [*shorter, "offload.kv=card"] if is_possible else shorter


def _disk_remedies(run: RunConfig, demand: Demand, inventory: Inventory) -> list[str]:
    if demand.kv_on_host:
        return []
    least = fewest_on_disk(run, demand, inventory)
    if least is None or run.model.weights == WeightsKind.dummy:
        return []
    if run.offload.disk is not None:
        return [f"offload.disk_layers={least.num_disk} or more"]
    where = f"some {least.num_disk} of {demand.shape.num_layers} layers from the checkpoint's files in every pass"
    return [f"offload.disk=checkpoint, which reads {where}"]


def _reason(run: RunConfig, demand: Demand, budgets: tuple[int, ...], inventory: Inventory) -> str:
    if run.offload.resident_layers is not None:
        return "offload.resident_layers was set."
    fewer_bits = "; model.quantize=int4 streams less, or nothing" if demand.shape.quantization == "none" else ""
    shorter = _with_shorter_sequences(run, demand, budgets, inventory)
    return f"what does not fit beside cache and activations{shorter}{fewer_bits}."


def _with_shorter_sequences(run: RunConfig, demand: Demand, budgets: tuple[int, ...], inventory: Inventory) -> str:
    """What room for no more than the workload's own sequences would save, where their lengths are known."""
    if run.engine.max_context is not None or run.num_prompt_tokens is None:
        return ""
    needed, on_card = run.needed_tokens, replace(demand, num_streamed=0, num_on_disk=0)
    num = choose_num_streamed(run, on_card, budgets, inventory, needed, needed, KEPT_FREE_STREAMED)
    return f"; {num} with engine.max_context={needed}" if num < demand.num_streamed else ""


def copy_gb_per_sec(card: Card) -> float | None:
    """Of a copy from pinned memory; None where the link is not known."""
    rate = COPY_GB_PER_SEC.get(card.pcie_generation or 0)
    return None if rate is None or not card.pcie_lanes else rate * card.pcie_lanes / FULL_LANES
