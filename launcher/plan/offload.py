"""What layers take that a run streams from host memory or the disk, and how long they make a pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from launcher.config import RunConfig, WeightsKind
from launcher.hardware.inventory import Card, Inventory
from launcher.memory.demand import Demand
from launcher.memory.fit import fits
from launcher.memory.kv import host_kv_bytes, host_kv_bytes_per_token
from launcher.memory.streamed import disk_bytes, ring_bytes
from launcher.plan.offload_choice import refused_by_host, stream_layers
from launcher.plan.offload_disk import (
    DiskRate,
    disk_rate,
    free_host_bytes,
    has_host_room,
    largest_host_context,
    needed_host_bytes,
    pack_ms,
    places,
)
from launcher.plan.refusal import refuse_host_memory
from launcher.plan.remedies import Refused, shorter_sequences
from launcher.plan.topology import PlanError

# What copies from pinned memory reach, by PCIe generation, over 16 lanes: 55 measured on an H200 (5.0); 25 and 12.4 are
# usual of 4.0 and 3.0, 0.8 of what the lanes carry.
COPY_GB_PER_SEC = {3: 12.4, 4: 25.0, 5: 55.0}
FULL_LANES = 16
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
        """What the slowest takes of what goes on at once: a rank's copies, the disk, and packing, which goes on between
        copies of what is packed; None where a link is not known."""
        times_ms = [self.disk_ms or 0.0]
        read = self.disk_bytes or (0,) * len(self.pass_bytes)
        for num_bytes, num_read, rate in zip(self.pass_bytes, read, self.copy_gb_per_sec, strict=True):
            if rate is None:
                return None
            read_ms = num_read / (rate * 1e9) * 1e3
            times_ms += [num_bytes / (rate * 1e9) * 1e3 + read_ms, read_ms + (self.pack_ms or 0.0)]
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


def plan_offload(
    run: RunConfig, demand: Demand, budgets: tuple[int, ...], inventory: Inventory, max_context: int
) -> OffloadPlan | None:
    """What `demand.num_streamed` layers in host memory and on the disk mean; None where there are none.

    Raises:
        PlanError: host memory does not suffice; the message has the sizes.
    """
    if demand.num_streamed == 0:
        return None
    host_bytes, free_bytes = demand.host_bytes(), free_host_bytes(run, inventory)
    needed = needed_host_bytes(demand, max_context)
    if free_bytes is not None and needed > free_bytes:
        refused = Refused(run, demand, budgets, inventory, run.engine.max_context or run.needed_tokens)
        remedies = _kv_remedies(run, demand, budgets, inventory, max_context) + _disk_remedies(refused)
        raise refuse_host_memory(refused, max_context, needed, free_bytes, remedies)
    on_host, on_disk = places(demand)
    cards = inventory.cards[: demand.world_size]
    return OffloadPlan(
        streamed_layers=on_host,
        resident_layers=demand.shape.num_layers - demand.num_streamed,
        reason=_reason(run, demand),
        host_bytes=host_bytes,
        needed_host_bytes=needed,
        free_host_bytes=free_bytes,
        pass_bytes=tuple(len(on_host) * size for size in demand.layer_bytes),
        copy_gb_per_sec=tuple(map(copy_gb_per_sec, cards)) or (None,) * len(host_bytes),
        host_may_compute=demand.host_computes,
        kv_host_bytes=host_kv_bytes(demand, max_context) if demand.num_kv_hosted else (0,) * demand.world_size,
        kv_bytes_per_token=host_kv_bytes_per_token(demand),
        **(_disk_part(run, demand, inventory, on_disk) if on_disk else {}),
    )


def check_disk(run: RunConfig, demand: Demand) -> None:
    """Raises PlanError: layers are to be read from files that there are not."""
    if demand.num_disk and run.model.weights == WeightsKind.dummy:
        raise PlanError(
            f"offload.disk={run.offload.disk} reads {demand.num_disk} layers from the checkpoint in every pass, and "
            "model.weights=dummy has none. Write one with tools.make_checkpoint, or lower what is streamed."
        )


def check_shared(run: RunConfig, demand: Demand) -> None:
    """Raises PlanError: the host is to compute some of the streamed layers, and cannot."""
    why_not = refused_by_host(run, demand)
    if demand.num_streamed and why_not is not None:
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


def _disk_remedies(refused: Refused) -> list[str]:
    """As a run that follows it would be planned: layers that are made on the card take room there, so that some more
    have to leave it."""
    run, demand = refused.run, refused.demand
    if demand.kv_on_host or run.model.weights == WeightsKind.dummy:
        return []
    followed = replace(run, offload=replace(run.offload, disk=run.offload.disk or "checkpoint", disk_layers=None))
    on_cards = replace(demand, num_streamed=0, num_on_disk=0)
    placed = stream_layers(followed, on_cards, refused.budgets, refused.inventory)
    if not refused.would_fit(placed):
        return []
    if run.offload.disk is not None:
        return [f"offload.disk_layers={placed.num_disk} or more"]
    where = f"{placed.num_disk} of {demand.shape.num_layers} layers from the checkpoint's files in every pass"
    return [f"offload.disk=checkpoint, which reads {where}"]


def _reason(run: RunConfig, demand: Demand) -> str:
    if run.offload.resident_layers is not None:
        return "offload.resident_layers was set."
    fewer_bits = "; model.quantize=int4 streams less, or nothing" if demand.shape.quantization == "none" else ""
    return f"what does not fit beside cache and activations{fewer_bits}."


def copy_gb_per_sec(card: Card) -> float | None:
    """Of a copy from pinned memory; None where the link is not known."""
    rate = COPY_GB_PER_SEC.get(card.pcie_generation or 0)
    return None if rate is None or not card.pcie_lanes else rate * card.pcie_lanes / FULL_LANES
