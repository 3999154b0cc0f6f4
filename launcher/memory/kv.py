"""Bytes of keys and values: of layers on the card, and of those in host memory, which come to the card in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parallel.kernels.limits import PAGE_SIZE
from parallel.offload.spread import NUM_STAGED

if TYPE_CHECKING:
    from launcher.memory.demand import Demand


def kv_lines(demand: Demand, rank: int, max_context: int) -> dict[str, int]:
    """What a rank takes for sequences of up to `max_context` tokens: kv_cache, kv_staging and, on a CPU, host_kv."""
    per_layer = layer_kv_bytes(demand, max_context)[rank]
    return {name: num * per_layer for name, num in kv_layers(demand).items()}


def kv_layers(demand: Demand) -> dict[str, int]:
    """How many layers each line is for."""
    hosted = demand.num_kv_hosted
    lines = {"kv_cache": demand.shape.num_layers - hosted}
    if hosted:
        lines["kv_staging"] = min(NUM_STAGED, hosted)
        if demand.device == "cpu":
            lines["host_kv"] = hosted
    return lines


def host_kv_bytes_per_token(demand: Demand) -> tuple[int, ...]:
    """What it takes of host memory on each rank, and brings to the card in every pass that attends to it."""
    return tuple(size // demand.shape.num_layers * demand.num_kv_hosted for size in demand.kv_bytes_per_token())


def host_kv_bytes(demand: Demand, max_context: int) -> tuple[int, ...]:
    """Of host memory, of each rank."""
    return tuple(demand.num_kv_hosted * size for size in layer_kv_bytes(demand, max_context))


def layer_kv_bytes(demand: Demand, max_context: int) -> tuple[int, ...]:
    """The pages of one layer on each rank."""
    num_slots = demand.limits(max_context).num_pages * PAGE_SIZE
    return tuple(size // demand.shape.num_layers * num_slots for size in demand.kv_bytes_per_token())
