"""Which streamed layers stay in host memory, and which are read from the disk because that does not suffice."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from launcher.config import RunConfig, TaskKind
from launcher.hardware.inventory import Card, Inventory
from launcher.memory.demand import Demand
from launcher.memory.fit import largest
from launcher.memory.kv import host_kv_bytes
from launcher.memory.streamed import ring_bytes
from parallel.footprint import predict_kernel
from parallel.offload.spread import spread_layers
from parallel.units import GIB

# Of host memory for the process of a rank beside its layers: Python, torch and CUDA, and buffers for reading.
HOST_BYTES_PER_RANK = 4 * GIB
# Where nothing is known of the disk: from a virtual one 4 threads got 3.6 to 4.1 (results/read_cpu_202611.md).
ASSUMED_GB_PER_SEC = 3.6
MEASURED = "measured on its files"
# A layer from the disk is packed on the card each time: as long as the card moves so many bytes for each weight. w4a16:
# counted, not measured (AWQ, which takes most: decoding 16, packing 3, joining 2). Of all others loads of a 70B on an
# H200 took 250 to 310, the host's time for thousands of launches included (results/one_card_h200_202611.json:
# decode_sec). Rounding: counted, not measured, of what does not stay in the card's cache.
PACK_BYTES = {"w4a16": 21}
OTHER_PACK_BYTES = 280
ROUNDING_BYTES = 150


@dataclass(frozen=True)
class DiskRate:
    """What all ranks together get from the disk, and where the number is from."""

    gb_per_sec: float
    source: str

    @property
    def is_measured(self) -> bool:
        return self.source == MEASURED


def place_layers(run: RunConfig, demand: Demand, inventory: Inventory, num_streamed: int) -> Demand:
    """`demand` with so many streamed layers, of which as many in host memory as fit or offload.disk_layers leaves.

    Without offload.disk that is all of them.
    """
    streamed = replace(demand, num_streamed=num_streamed, num_on_disk=0)
    if run.offload.disk is None:
        return streamed
    if run.offload.disk_layers is not None:
        return replace(streamed, num_on_disk=min(run.offload.disk_layers, num_streamed))
    return fewest_on_disk(run, streamed, inventory) or replace(streamed, num_on_disk=num_streamed)


def fewest_on_disk(run: RunConfig, streamed: Demand, inventory: Inventory) -> Demand | None:
    """With the others in host memory; None where that does not even hold what layers on the disk need."""
    candidates = (replace(streamed, num_on_disk=num) for num in range(streamed.num_streamed + 1))
    return next((each for each in candidates if has_host_room(run, each, inventory)), None)


def needed_host_bytes(demand: Demand, max_context: int = 0) -> int:
    """Of all ranks: layers, embedding, keys and values of sequences of `max_context` tokens where they lie there, the
    buffers of what is read from the disk, and all else."""
    kept = sum(demand.host_bytes()) + sum(host_kv_bytes(demand, max_context))
    return kept + sum(ring_bytes(demand)) + demand.world_size * HOST_BYTES_PER_RANK


def has_host_room(run: RunConfig, demand: Demand, inventory: Inventory, max_context: int = 0) -> bool:
    """Whether host memory suffices for what is streamed, as far as it is known."""
    free_bytes = free_host_bytes(run, inventory)
    return demand.num_streamed == 0 or free_bytes is None or needed_host_bytes(demand, max_context) <= free_bytes


def largest_host_context(run: RunConfig, demand: Demand, inventory: Inventory, limit: int) -> int:
    """The most tokens of a sequence, up to `limit`, for whose keys and values there is host memory."""
    if demand.num_kv_hosted == 0:
        return limit
    return largest(lambda tokens: has_host_room(run, demand, inventory, tokens), limit)


def free_host_bytes(run: RunConfig, inventory: Inventory) -> int | None:
    """For such a run beside its cards; None where that is another machine's, or ranks are on the CPU."""
    sizes = [round(run.limits.host_memory_gib * GIB)] if run.limits.host_memory_gib else []
    if inventory.source == "nvml":
        # A plan is about the machine, a run about what is free.
        sizes.append(inventory.host_memory_bytes if run.task.kind == TaskKind.plan else inventory.host_free_bytes)
    return min(sizes, default=None)


def places(demand: Demand) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices of the layers in host memory and of those on the disk, both spread evenly."""
    streamed = spread_layers(demand.shape.num_layers, demand.num_streamed)
    chosen = set(spread_layers(len(streamed), demand.num_disk)) if demand.num_disk else set()
    return (
        tuple(index for place, index in enumerate(streamed) if place not in chosen),
        tuple(index for place, index in enumerate(streamed) if place in chosen),
    )


def disk_rate(run: RunConfig, inventory: Inventory) -> DiskRate:
    if run.hardware.disk_gb_per_sec > 0:
        return DiskRate(run.hardware.disk_gb_per_sec, f"assumed, hardware={run.hardware.name}")
    if inventory.disk_gb_per_sec is not None:
        return DiskRate(inventory.disk_gb_per_sec, MEASURED)
    return DiskRate(ASSUMED_GB_PER_SEC, "assumed; hardware.disk_gb_per_sec sets it")


def pack_ms(demand: Demand, cards: tuple[Card, ...]) -> float | None:
    """What the cards take to pack the layers of a pass, predicted; None on a CPU, and where a speed is unknown."""
    rates = [card.memory_gb_per_sec for card in cards]
    if not cards or None in rates:
        return None
    if demand.shape.quantization == "none":
        return 0.0
    weights = demand.num_disk * demand.shape.num_linear_weights / demand.shape.num_layers / demand.world_size
    num_bytes = weights * pack_bytes(demand)
    return num_bytes / (statistics.fmean(filter(None, rates)) * 1e9) * 1e3


def pack_bytes(demand: Demand) -> int:
    """For each weight."""
    scheme = demand.shape.scheme
    if scheme is None:
        return OTHER_PACK_BYTES
    rounding = ROUNDING_BYTES if scheme.layout == "rounded" else 0
    return rounding + PACK_BYTES.get(predict_kernel(scheme, demand.device, demand.dtype), OTHER_PACK_BYTES)
