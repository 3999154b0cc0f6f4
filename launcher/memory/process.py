"""Bytes that a rank takes before the first weight: its process, and what it talks to others through."""

from __future__ import annotations

from parallel.transports.copy_layout import choose_layout
from parallel.units import MIB

# CUDA context, kernels and cuBLAS workspace: 701 MiB measured on an H200 with torch 2.11 (8B bf16, one rank: NVML's
# count less what torch had reserved). Python with torch and transformers on the CPU: 415 MiB resident measured with
# torch 2.13 and transformers 5.23, 375 of them by its imports (task=generate, one rank, a prompt of 692 tokens;
# task=bench, which also profiles its steps, takes 46 MiB more).
CONTEXT_BYTES = {"cuda": 701 * MIB, "cpu": 415 * MIB}
# Buffers of the communicator on the card, measured on two H200 with NCCL 2.28: 382 MiB where it goes through host
# memory, 838 MiB over NVLink. Gloo, with what the messages of its self-test leave: 4 MiB more resident at two ranks.
COMMUNICATOR_BYTES = {"nccl": 382 * MIB, "nccl over nvlink": 838 * MIB, "gloo": 4 * MIB, "solo": 0}


def process_lines(device: str, transport: str, world_size: int) -> dict[str, int]:
    """The lines context and communicator. Between cards that go through host memory copies of messages are added up."""
    copies = transport == "nccl" and world_size > 1
    staging = choose_layout(world_size).staging_bytes if copies else 0
    return {"context": CONTEXT_BYTES[device], "communicator": COMMUNICATOR_BYTES[transport] + staging}
