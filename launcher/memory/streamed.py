"""Bytes that layers take which come to the card in every pass, from host memory or the disk, predicted."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from launcher.memory.kv import host_kv_bytes
from launcher.memory.weights import stored_linear_bits
from launcher.models.shape import DTYPE_BYTES, ModelShape, part_bytes
from parallel.checkpoint.load_memory import load_bytes
from parallel.footprint import DEQUANTIZED_AT_A_TIME, HOST_INT4_PRODUCT_BYTES, held_bits, host_int4_bits
from parallel.offload.spread import NUM_STAGED
from parallel.partition import split_by_grain, split_by_heads
from parallel.units import MIB

# Of a layer: linears with scales and zeros, and norms; of these, linears.
NUM_TENSORS = 23
NUM_LINEARS = 7
# As parallel/checkpoint/read_ahead.py has it, which imports torch.
CHUNK_BYTES = 4 * MIB
# Host memory that a card can read takes an entry of 8 bytes of its page tables for 4 KiB: 70Bs on an H200 took 198, 212
# and 234 MiB outside of torch's allocator with 18.5, 24.7 and 37.6 GiB pinned, which are these and 161 MiB, 75 more
# than the context of a run whose layers are all on the card.
PINNED_PER_MAPPING = 4096 // 8
STREAMING_BYTES = 75 * MIB

if TYPE_CHECKING:
    from launcher.memory.demand import Demand


def streamed_lines(demand: Demand) -> tuple[dict[str, int], ...]:
    """The buffers of layers that are copied, and one that is made; on a CPU also what lies in host memory, since all
    does. One dict per rank."""
    if demand.num_streamed == 0:
        return ({},) * demand.world_size
    staged = NUM_STAGED if demand.num_streamed > demand.num_disk else 0
    sizes = demand.layer_bytes
    staging = [{"staging": staged * size} | sharing_lines(demand, size) if staged else {} for size in sizes]
    rings = ring_bytes(demand) if demand.device == "cpu" else (0,) * demand.world_size
    disk = [
        {"disk": made_layer_bytes(demand, rank) + ring} if demand.num_disk else {} for rank, ring in enumerate(rings)
    ]
    on_cpu = [{"host_weights": size} if demand.device == "cpu" else {} for size in demand.host_bytes()]
    return tuple(a | b | c for a, b, c in zip(staging, disk, on_cpu, strict=True))


def mapping_lines(demand: Demand, rank: int, max_context: int) -> dict[str, int]:
    """What a card takes outside of torch's allocator to read from pinned host memory."""
    if demand.device == "cpu" or demand.num_streamed == 0:
        return {}
    pinned = demand.host_bytes()[rank] + host_kv_bytes(demand, max_context)[rank]
    return {"mappings": STREAMING_BYTES + pinned // PINNED_PER_MAPPING}


def brought_bytes(demand: Demand, rank: int) -> int:
    """Of the card, where layers are that are copied to it, or made there."""
    size = demand.layer_bytes[rank]
    staged = NUM_STAGED * size if demand.num_streamed > demand.num_disk else 0
    return staged + (made_layer_bytes(demand, rank) if demand.num_disk else 0)


def sharing_lines(demand: Demand, layer_bytes: int) -> dict[str, int]:
    """What layers that are packed for the host take beyond others when they are streamed: in the buffers, and to be
    dequantised."""
    scheme = demand.shape.scheme
    if not demand.host_computes or scheme is None:
        return {}
    held = held_bits(scheme, demand.device, demand.dtype, demand.shape.hidden_size)
    wider = max(0.0, host_int4_bits(scheme, demand.shape.hidden_size) / held - 1)
    rows = max(demand.prefill_chunk, demand.batch_size * demand.rows_per_sequence)
    own = demand.layer(0).product(rows, DEQUANTIZED_AT_A_TIME)
    dequantizing = max(0, HOST_INT4_PRODUCT_BYTES - own)
    return {"sharing": math.ceil(NUM_STAGED * layer_bytes * wider) + dequantizing}


def ring_bytes(demand: Demand) -> tuple[int, ...]:
    """Of host memory, of each rank: where a layer is read ahead; each tensor leaves half a buffer empty."""
    stored = stored_layer_bytes(demand) if demand.num_disk else (0,) * demand.world_size
    return tuple(size + NUM_TENSORS * min(CHUNK_BYTES, size // NUM_LINEARS) // 2 for size in stored)


def disk_bytes(demand: Demand) -> tuple[int, ...]:
    """What each rank reads from the disk in a pass."""
    return tuple(demand.num_disk * size for size in stored_layer_bytes(demand))


def stored_layer_bytes(demand: Demand) -> tuple[int, ...]:
    """Weights of one decoder layer on each rank, as the checkpoint has them."""
    shape, bits = demand.shape, stored_linear_bits(demand.shape)
    with_one, without = (
        part_bytes(replace(shape, num_layers=num), demand.world_size, demand.grain, shape.dtype, linear_bits=bits)
        for num in (1, 0)
    )
    return tuple(sum(a.values()) - sum(b.values()) for a, b in zip(with_one, without, strict=True))


def made_layer_bytes(demand: Demand, rank: int) -> int:
    """A layer from the disk while it is made: packed, and beside it what its largest linear takes, or what merges gate
    and up."""
    packed = demand.layer_bytes[rank]
    intermediate = split_by_grain(demand.shape.intermediate_size, demand.world_size, demand.grain)[rank]
    queries = split_by_heads(demand.shape.num_heads, demand.world_size, demand.shape.num_kv_heads)[rank]
    numel = max(queries * demand.shape.head_dim, intermediate) * demand.shape.hidden_size
    weights = demand.shape.num_linear_weights / demand.shape.num_layers / demand.world_size
    gate_up = round(packed * 2 * intermediate * demand.shape.hidden_size / weights)
    return packed + max(linear_load(demand.shape, demand.device, demand.dtype, numel), min(gate_up, packed))


def linear_load(shape: ModelShape, device: str, dtype: str, numel: int) -> int:
    """What the load of a linear of so many weights takes beside what stays."""
    stored_bytes = DTYPE_BYTES[shape.dtype]
    if shape.scheme is None:
        return numel * stored_bytes if shape.dtype != dtype else 0
    return load_bytes(shape.scheme, device, dtype, stored_bytes, shape.hidden_size, numel)
