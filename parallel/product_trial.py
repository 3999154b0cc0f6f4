"""Up to how many rows a card is faster with packed weights than with dequantised ones: both are timed before the load.

Dequantising a weight reads and writes it, whatever the rows; multiplying by the packed one unpacks it for every tile of
rows. Which is less differs from card to card with its memory and its tensor cores.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from parallel.checkpoint.dummy import Pool, quantized_values
from parallel.communicator import Communicator
from parallel.footprint import MIN_FUSED_ROWS
from parallel.formats.scheme import Box, Scheme
from parallel.kernels.choice import pack_linear
from parallel.kernels.grouping import GroupedLinear
from parallel.kernels.merge import merge
from parallel.kernels.w4a16 import W4A16Linear
from parallel.kernels.w8a16 import W8A16Linear
from parallel.transports.choice import faster_up_to

TRIED_ROWS = (MIN_FUSED_ROWS, 512, 1024, 2048)
# Of the trial's weight, at most: 64 MiB at 4 bits, which with all else that a product touches no card's cache keeps.
TRIAL_WEIGHTS = 128 * 1024**2
# Made once, and repeated.
PART_OUTPUTS = 1024
REPEATS = 3
# A millisecond or so, in which the host queues what is timed.
AHEAD_CYCLES = 2_000_000

# Milliseconds of what a call queues.
Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class FusedRows:
    """Products of up to `limit` rows are with the packed weight, of more with the dequantised one; and why.

    Milliseconds of either way by rows, on the slowest rank; empty where nothing was timed.
    """

    limit: int
    reason: str
    packed_ms: dict[int, float] = field(default_factory=dict)
    dequantized_ms: dict[int, float] = field(default_factory=dict)


def rows_limit(chosen: FusedRows | None) -> int:
    """What linears are built with; `chosen`: None where there was no choice."""
    return MIN_FUSED_ROWS if chosen is None else chosen.limit


@torch.inference_mode()
def measure_fused_rows(
    scheme: Scheme, num_out: int, num_in: int, communicator: Communicator, device: torch.device
) -> FusedRows:
    """On this rank's card, with a weight such as a linear of these outputs and inputs has. To be called on all ranks.

    The card's memory is then as it was.
    """
    found = try_linear(trial_linear(scheme, num_out, num_in, device), communicator, device, time_on_card)
    # cuBLAS would keep its own in the middle of what the load is to fill.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return found


def try_linear(linear: nn.Module, communicator: Communicator, device: torch.device, timer: Timer) -> FusedRows:
    """The choice of all ranks, by the slowest one's times."""
    times = torch.tensor(time_ways(linear, device, timer), dtype=torch.float64, device=device)
    slowest = communicator.all_gather(times).amax(dim=0)
    packed, dequantized = (dict(zip(TRIED_ROWS, way, strict=True)) for way in slowest.tolist())
    return choose_limit(packed, dequantized)


def choose_limit(packed_ms: Mapping[int, float], dequantized_ms: Mapping[int, float]) -> FusedRows:
    """The largest number of rows up to which the packed weight is faster, or else as many as always go with it."""
    if not all(map(math.isfinite, packed_ms.values())):
        return FusedRows(MIN_FUSED_ROWS, "a rank cannot multiply by the packed weight")
    packed, dequantized = dict(packed_ms), dict(dequantized_ms)
    limit = max(MIN_FUSED_ROWS, faster_up_to(packed, dequantized))
    above = [rows for rows in packed if rows > limit][:1]
    reason = "; ".join(
        f"{packed[rows]:.2f} ms for {rows} rows with a packed weight, {dequantized[rows]:.2f} ms with it dequantised"
        for rows in (limit, *above)
    )
    return FusedRows(limit, reason, packed, dequantized)


def time_ways(linear: nn.Module, device: torch.device, timer: Timer) -> list[list[float]]:
    """Milliseconds with the packed weight, and with it dequantised, of each of TRIED_ROWS."""
    if not isinstance(linear, W4A16Linear | W8A16Linear):
        return [[math.inf] * len(TRIED_ROWS)] * 2
    rows = torch.randn(max(TRIED_ROWS), linear.num_in, device=device, dtype=torch.bfloat16)
    found = [time_both(linear, rows[:number], timer) for number in TRIED_ROWS]
    return [list(way) for way in zip(*found, strict=True)]


def time_both(linear: GroupedLinear, rows: Tensor, timer: Timer) -> tuple[float, float]:
    """Medians, of turns: what changes meanwhile, such as clocks, changes both. The first calls load kernels."""
    ways = (lambda: linear.multiply(rows), lambda: linear.multiply_dequantized(rows))
    turns = [[timer(way) for way in ways] for _ in range(1 + REPEATS)][1:]
    packed, dequantized = (statistics.median(times) for times in zip(*turns, strict=True))
    return packed, dequantized


def trial_linear(scheme: Scheme, num_out: int, num_in: int, device: torch.device) -> nn.Module:
    """Multiplies by a weight of random values, of so many outputs or as many as TRIAL_WEIGHTS allow."""
    outputs = min(num_out, PART_OUTPUTS)
    box = Box((0, outputs), (0, num_in))
    weight = quantized_values(Pool(num_in, device), "trial", (outputs, num_in), box, scheme)
    part, _ = pack_linear(weight, torch.bfloat16)
    count = max(1, min(num_out, TRIAL_WEIGHTS // num_in) // outputs)
    return merge([part] * count) or part


def time_on_card(call: Callable[[], object]) -> float:
    """Milliseconds by the card's clock, of what the host has queued by the time that the card begins."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(AHEAD_CYCLES)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
