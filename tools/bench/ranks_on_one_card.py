"""Ranks that are streams of one process: what host memory carries between cards, on one card and truly concurrent.

Two processes on one card take turns of milliseconds; streams run side by side, which gives a latency worth measuring
(without the second card's link) and as many calls as a soak wants.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

# Streams that share one of the card's queues wait for one another, and ranks must not. CUDA reads it when it starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import torch

from parallel.transports import dense
from parallel.transports.channel import Channel
from parallel.transports.dense import DenseChannel, DenseLayout, LineFormat
from parallel.transports.host_memory import MAX_BYTES, SlotChannel, SlotLayout
from parallel.transports.host_memory_norm import NormChannel, NormLayout
from parallel.transports.region_layout import RegionLayout
from parallel.transports.shared_region import SharedRegion, create_memory
from parallel.transports.two_step import PIECE_BYTES, TwoStepChannel, TwoStepLayout

C = TypeVar("C", bound=Channel[Any])


class RanksOnOneCard(Generic[C]):
    """A channel a rank over one registered region, and a stream for each.

    Memory must be allocated and inputs made before `run`: what waits for the card would wait for a peer's kernel too.
    """

    def __init__(self, kind: type[C], layout: RegionLayout, device: torch.device, timeout_sec: float) -> None:
        self.device = device
        torch.zeros(1, device=device)
        descriptor = create_memory(layout.num_bytes)
        self.region = SharedRegion(descriptor, layout.num_bytes)
        os.close(descriptor)
        self.region.register()
        ranks = range(layout.world_size)
        self.channels = [kind(self.region, layout, rank, device, timeout_sec=timeout_sec) for rank in ranks]
        self.streams = [torch.cuda.Stream(device) for _ in ranks]
        torch.cuda.synchronize(device)

    def run(self, call: Callable[[C], object], ranks: Sequence[int] | None = None) -> None:
        """Calls `call(channel)` for each rank on its own stream, after what the current stream has queued."""
        chosen = range(len(self.channels)) if ranks is None else ranks
        current = torch.cuda.current_stream(self.device)
        # All of these before any kernel: an event behind a kernel that waits would never come.
        for rank in chosen:
            self.streams[rank].wait_stream(current)
        for rank in chosen:
            with torch.cuda.stream(self.streams[rank]):
                call(self.channels[rank])
        for rank in chosen:
            current.wait_stream(self.streams[rank])

    def capture(self, call: Callable[[C], object]) -> list[torch.cuda.CUDAGraph]:
        """One graph a rank of what `call(channel)` queues."""
        graphs = []
        for channel, stream in zip(self.channels, self.streams, strict=True):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], stream=stream):
                call(channel)
        return graphs

    def check(self) -> None:
        """Raises TransportError if a rank did not answer another."""
        torch.cuda.synchronize(self.device)
        for channel in self.channels:
            channel.check()


@contextmanager
def ranks_on_one_card(
    world_size: int, device: torch.device, *, max_bytes: int = MAX_BYTES, timeout_sec: float = 10
) -> Iterator[RanksOnOneCard[SlotChannel]]:
    """Ranks that talk through slots."""
    yield from closing(RanksOnOneCard(SlotChannel, SlotLayout(world_size, max_bytes), device, timeout_sec))


@contextmanager
def dense_on_one_card(
    world_size: int,
    device: torch.device,
    *,
    max_bytes: int = dense.MAX_BYTES,
    lines: LineFormat = dense.EXACT,
    timeout_sec: float = 10,
) -> Iterator[RanksOnOneCard[DenseChannel]]:
    """Ranks that exchange a batch's messages in one hop."""
    yield from closing(RanksOnOneCard(DenseChannel, DenseLayout(world_size, max_bytes, lines), device, timeout_sec))


@contextmanager
def norm_on_one_card(
    world_size: int, device: torch.device, *, timeout_sec: float = 10
) -> Iterator[RanksOnOneCard[NormChannel]]:
    """Ranks whose sums and norms are one kernel."""
    yield from closing(RanksOnOneCard(NormChannel, NormLayout(world_size), device, timeout_sec))


@contextmanager
def two_step_on_one_card(
    world_size: int, device: torch.device, *, piece_bytes: int = PIECE_BYTES, timeout_sec: float = 10
) -> Iterator[RanksOnOneCard[TwoStepChannel]]:
    """Ranks that exchange large messages in two steps."""
    yield from closing(RanksOnOneCard(TwoStepChannel, TwoStepLayout(world_size, piece_bytes), device, timeout_sec))


def closing(ranks: RanksOnOneCard[C]) -> Iterator[RanksOnOneCard[C]]:
    try:
        yield ranks
    finally:
        torch.cuda.synchronize(ranks.device)
        ranks.region.unregister()
