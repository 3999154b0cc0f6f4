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
# A layer from the disk is made on the card in every pass: decoded or rounded, packed, and joined with its like. Bytes
# that this moves for each weight, counted (tests/launcher/plan/test_pack_ms.py), not measured; decoding is AWQ's, which
# moves most. What other kernels read is packed by plain torch, in thousands of launches: as long as the card moves 250
# to 310, where that was measured, of 8 bits before one launch packed them (results/one_card_h200_202611.json:
# decode_sec).
DECODE_BYTES = 10
ROUND_BYTES = 4
PACK_BYTES = {"w4a16": 5, "w8a16": 8}
OTHER_PACK_BYTES = 280
# Rounding also takes instructions: of a warp for 128 weights, as round_groups.cu is compiled for an RTX 4090. Each of
# its 128 multiprocessors starts 4 a clock. By the lower clock of an H200, which has four more of them.
ROUND_INSTRUCTIONS = {"int4": 1024, "int8": 304, "fp8": 328}
INSTRUCTIONS_PER_SEC = 128 * 4 * 1.7e9


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
    bytes_per_sec = statistics.fmean(filter(None, rates)) * 1e9
    return weights * (pack_bytes(demand) / bytes_per_sec + round_sec(demand)) * 1e3


def pack_bytes(demand: Demand) -> int:
    """For each weight."""
    scheme = demand.shape.scheme
    if scheme is None:
        return OTHER_PACK_BYTES
    made = ROUND_BYTES if scheme.layout == "rounded" else DECODE_BYTES
    return made + PACK_BYTES.get(predict_kernel(scheme, demand.device, demand.dtype), OTHER_PACK_BYTES)


def round_sec(demand: Demand) -> float:
    """For each weight, that its rounding computes."""
    scheme = demand.shape.scheme
    if scheme is None or scheme.layout != "rounded":
        return 0.0
    return ROUND_INSTRUCTIONS[scheme.method] / 128 / INSTRUCTIONS_PER_SEC
