"""How fast a card copies: within its own memory, and from the host's."""

from __future__ import annotations

import statistics

import torch

from parallel.units import MIB

# Far above the caches of any card (50 MB on an H200, 72 MB on an RTX 4090).
COPY_BYTES = 512 * MIB
NUM_COPIES = 10


def copy_bandwidth(device: torch.device) -> float | None:
    """Bytes a second that a card reads and writes while it copies memory, the median of some copies; None on a CPU."""
    if device.type == "cpu":
        return None
    source, target = torch.zeros(2, COPY_BYTES, dtype=torch.uint8, device=device)
    target.copy_(source)
    sec = statistics.median(timed_copy(source, target) for _ in range(NUM_COPIES))
    del source, target
    torch.cuda.empty_cache()
    return 2 * COPY_BYTES / sec


def pinned_copy_bandwidth(device: torch.device) -> float | None:
    """Bytes a second that a plain copy from torch's own pinned memory brings to a card, the median of some; None on a
    CPU."""
    if device.type == "cpu":
        return None
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target.copy_(source, non_blocking=True)
    sec = statistics.median(timed_copy(source, target) for _ in range(NUM_COPIES))
    del source, target
    torch.cuda.empty_cache()
    torch._C._host_emptyCache()
    return COPY_BYTES / sec


def timed_copy(source: torch.Tensor, target: torch.Tensor) -> float:
    """Seconds, by the card's own clock."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    target.copy_(source, non_blocking=True)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
