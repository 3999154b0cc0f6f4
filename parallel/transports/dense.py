"""All-reduce of a batch's messages in one hop through pinned host memory, an eighth of it flags (host_memory_dense.cu).

Between what slots of half flags carry best (host_memory.py) and what pays for two steps (two_step.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.transports.channel import (
    PAGE_BYTES,
    REDUCTIONS,
    Channel,
    OverChannel,
    open_channel,
    reduce_aligned,
)
from parallel.transports.host_memory import KIB, MAX_RANKS
from parallel.transports.shared_region import SharedRegion

MAX_BYTES = 2048 * KIB
UNIT_BYTES = 16
LANES = 32
# As in host_memory_dense.cu: of each lane in a tile.
UNITS = 7
LINES = 8
TILE_BYTES = UNITS * LANES * UNIT_BYTES
NUM_TAGS = 65535
# (up to so many bytes, blocks, warps a block): the best between two H200 over PCIe 5.0, by KiB in us: 64 in 7.3; 128 in
# 9.7, 256 in 15.0; 512 in 27, 1024 in 41.5, 2048 in 73. Up to 256 KiB each tile has a warp of its own. Beyond, 64 warps
# with a page each on its way in each direction fill the link; with 256, all is written before anything is read: 85 us.
LAUNCHES: tuple[tuple[int, int, int], ...] = ((64 * KIB, 16, 2), (256 * KIB, 64, 2), (MAX_BYTES, 16, 4))


@dataclass(frozen=True)
class DenseLayout:
    """Where things lie in the region: a page of error words, then each rank's two slots; all in bytes."""

    world_size: int
    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        assert 2 <= self.world_size <= MAX_RANKS, self.world_size
        assert self.max_bytes >= UNIT_BYTES, self.max_bytes
        # Each slot is used by every other call, and a call renews one row.
        assert 2 * self.slot_rows < NUM_TAGS, self.max_bytes

    @property
    def slot_tiles(self) -> int:
        return -(-self.max_bytes // TILE_BYTES)

    @property
    def slot_rows(self) -> int:
        return self.slot_tiles * LINES

    @property
    def slot_bytes(self) -> int:
        # A tile fills a page, so that each lies near the processor of the rank that writes it.
        return self.slot_tiles * PAGE_BYTES

    @property
    def num_bytes(self) -> int:
        return self.own(self.world_size)[0]

    def own(self, rank: int) -> tuple[int, int]:
        return PAGE_BYTES + 2 * rank * self.slot_bytes, PAGE_BYTES + 2 * (rank + 1) * self.slot_bytes


def choose_launch(num_bytes: int) -> tuple[int, int]:
    """Blocks and threads for a message, from `LAUNCHES`; no more warps than have a tile to carry."""
    tiles = -(-num_bytes // TILE_BYTES)
    most, warps = next((blocks, warps) for up_to, blocks, warps in LAUNCHES if num_bytes <= up_to)
    blocks = min(most, tiles)
    return blocks, LANES * min(warps, -(-tiles // blocks))


class DenseChannel(Channel):
    """All-reduce of up to `layout.max_bytes` in whole units, on tensors that are contiguous and aligned to 16 bytes."""

    def __init__(
        self, region: SharedRegion, layout: DenseLayout, rank: int, device: torch.device, *, timeout_sec: float
    ) -> None:
        super().__init__(
            region,
            layout.world_size,
            rank,
            device,
            source="host_memory_dense.cu",
            names=tuple(REDUCTIONS.values()),
            timeout_sec=timeout_sec,
        )
        self.layout = layout

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """Sum over the ranks of `source`, into `target`, which may be the same."""
        size, tiles = source.nbytes, self.layout.slot_tiles
        self.launch(REDUCTIONS[source.dtype], source, target, size, tiles, *choose_launch(size))


class DenseHostMemory(OverChannel[DenseChannel]):
    """All-reduces of whole units of up to `max_bytes` in one hop through host memory, the rest through `inner`."""

    name = "host_memory_dense"

    def __init__(self, inner: Communicator, channel: DenseChannel) -> None:
        super().__init__(inner, channel)
        self.max_bytes = channel.layout.max_bytes

    def all_reduce(self, tensor: Tensor) -> Tensor:
        # By what all ranks know: the length and the type, not where the tensor lies.
        whole = tensor.nbytes % UNIT_BYTES == 0 and 0 < tensor.nbytes <= self.max_bytes
        if tensor.dtype not in REDUCTIONS or not whole:
            return self.inner.all_reduce(tensor)
        return reduce_aligned(self.channel.all_reduce, tensor, UNIT_BYTES)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self.inner.all_gather(tensor)


def wrap_dense(
    inner: Communicator, device: torch.device, *, timeout_sec: float, max_bytes: int = MAX_BYTES
) -> DenseHostMemory:
    """Opens slots for all ranks of `inner`, which carries what they do not.

    Raises:
        TransportError: as `open_channel`.
    """
    layout = DenseLayout(inner.world_size, max_bytes)
    make = lambda region: DenseChannel(region, layout, inner.rank, device, timeout_sec=timeout_sec)  # noqa: E731
    return DenseHostMemory(inner, open_channel(inner, device, layout, make))
