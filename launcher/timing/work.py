"""From a model's shape to what predictions count: bytes of a layer, of the head and of a message."""

from __future__ import annotations

from launcher.memory.demand import Demand
from launcher.models.shape import DTYPE_BYTES, part_bytes
from launcher.timing.load import Work

PLAIN_BITS = 16.0
LINEARS = ("attention", "mlp")
OTHER = "another format"


def work_of(demand: Demand) -> Work:
    """Of the rank that holds most."""
    shape = demand.shape
    held = max(demand.fixed_lines(), key=lambda lines: sum(lines.values()))
    plain = part_bytes(shape, demand.world_size, demand.grain, demand.dtype, linear_bits=PLAIN_BITS)
    head = "embedding" if shape.tied_embeddings else "head"
    return Work(
        format=format_name(demand),
        num_layers=shape.num_layers,
        layer_bytes=sum(held[f"weights.{name}"] for name in LINEARS) // shape.num_layers,
        layer_plain_bytes=max(sum(part[name] for name in LINEARS) for part in plain) // shape.num_layers,
        head_bytes=held[f"weights.{head}"],
        kv_bytes_per_token=max(demand.kv_bytes_per_token()) // shape.num_layers,
        num_heads=max(demand.local(shape.num_heads)),
        message_bytes=shape.hidden_size * DTYPE_BYTES[demand.dtype],
    )


def format_name(demand: Demand) -> str:
    """How linears are multiplied by, as rates are kept: bf16, int4, int8 or fp8; OTHER: by nothing that is measured."""
    scheme = demand.shape.scheme
    if demand.dtype == "float32" or demand.shape.not_loadable:
        return OTHER
    if scheme is None:
        return "bf16"
    if scheme.has_codebook:
        return OTHER
    return "fp8" if scheme.is_float else f"int{scheme.bits}"
