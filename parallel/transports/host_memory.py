"""Small collectives in one kernel, through slots in pinned host memory that every card reads (host_memory.cu).

Cards without peer access, as RTX 4090s, reach one another only through the host. NCCL's path there costs 24.7 us for
the message of a decode step, a kernel of this kind 4.3 us (two H200, 16 KiB).

Why two slots a rank are enough: a card that runs call e + 1 has finished call e, for which it read a line of every
peer's call e. A peer writes those after its call e - 1 has ended, since calls of a rank run one after the other on its
card. So when anyone overwrites the slot of call e - 1 with call e + 1, everyone has read it. Every call reads every
peer, so this holds whatever the sizes and grids of the calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.transports.channel import REDUCTIONS, Channel, OverChannel, aligned, open_channel, reduce_aligned
from parallel.transports.region_layout import MAX_RANKS, PAGE_BYTES
from parallel.transports.torch_distributed import open_nccl
from parallel.units import KIB

DATA_BYTES = 8
LINE_BYTES = 16
# What a slot can carry; the choice of transport finds out by measurement up to which size it pays.
MAX_BYTES = 512 * KIB
# (up to so many bytes, blocks, threads), on an H200 at PCIe 5.0: 4.3 us, 7.6 us and 20.5 us at these sizes.
LAUNCHES = ((16 * KIB, 8, 256), (64 * KIB, 16, 256), (256 * KIB, 32, 512), (MAX_BYTES, 64, 512))
GATHER = "gather_bytes"


@dataclass(frozen=True)
class SlotLayout:
    """Where things lie in the region: a page of error words, then each rank's two slots; all in bytes."""

    world_size: int
    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        assert 2 <= self.world_size <= MAX_RANKS, self.world_size
        # Slots are whole pages, so that each lies near the processor of the rank that writes it.
        assert self.max_bytes > 0 and self.slot_bytes % PAGE_BYTES == 0, self.max_bytes

    @property
    def slot_bytes(self) -> int:
        return self.max_bytes // DATA_BYTES * LINE_BYTES

    @property
    def slot_lines(self) -> int:
        return self.slot_bytes // LINE_BYTES

    @property
    def num_bytes(self) -> int:
        return PAGE_BYTES + 2 * self.world_size * self.slot_bytes

    def slot(self, rank: int, epoch: int) -> int:
        return PAGE_BYTES + (2 * rank + epoch % 2) * self.slot_bytes

    def own(self, rank: int) -> tuple[int, int]:
        return self.slot(rank, 0), self.slot(rank, 1) + self.slot_bytes


def choose_launch(num_bytes: int) -> tuple[int, int]:
    """Blocks and threads for a message, from `LAUNCHES`; no more blocks than have a line to carry."""
    lines = -(-num_bytes // DATA_BYTES)
    blocks, threads = next((blocks, threads) for most, blocks, threads in LAUNCHES if num_bytes <= most)
    return min(blocks, -(-lines // threads)), threads


class SlotChannel(Channel[SlotLayout]):
    """Collectives of up to `layout.max_bytes`, on tensors that are contiguous and aligned to 8 bytes."""

    source = "host_memory.cu"
    names = (*REDUCTIONS.values(), GATHER)

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """Sum over the ranks of `source`, into `target`, which may be the same."""
        self._launch(REDUCTIONS[source.dtype], source, target)

    def all_gather(self, source: Tensor, target: Tensor) -> None:
        """`source` of each rank, of any type, into `target`, [world_size, ...]."""
        self._launch(GATHER, source, target)

    def _launch(self, name: str, source: Tensor, target: Tensor) -> None:
        self.launch(name, source, target, source.nbytes, self.layout.slot_lines, *choose_launch(source.nbytes))


class HostMemory(OverChannel[SlotChannel]):
    """Messages of up to `max_bytes` through host memory, larger ones and other types through `inner`."""

    name = "host_memory"

    def __init__(self, inner: Communicator, channel: SlotChannel) -> None:
        super().__init__(inner, channel)
        self.max_bytes = channel.layout.max_bytes

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if tensor.dtype not in REDUCTIONS or not 0 < tensor.nbytes <= self.max_bytes:
            return self.inner.all_reduce(tensor)
        return reduce_aligned(self.channel.all_reduce, tensor, DATA_BYTES)

    def all_gather(self, tensor: Tensor) -> Tensor:
        if not 0 < tensor.nbytes <= self.max_bytes:
            return self.inner.all_gather(tensor)
        gathered = tensor.new_empty(self.world_size, *tensor.shape)
        self.channel.all_gather(aligned(tensor, DATA_BYTES), gathered)
        return gathered


def wrap_host_memory(
    inner: Communicator, device: torch.device, *, timeout_sec: float, max_bytes: int = MAX_BYTES
) -> HostMemory:
    """Opens slots for all ranks of `inner`, which carries what is too large for them.

    Raises:
        TransportError: as `open_channel`.
    """
    layout = SlotLayout(inner.world_size, max_bytes)
    return HostMemory(inner, open_channel(SlotChannel, inner, device, layout, timeout_sec=timeout_sec))


def open_host_memory(device: torch.device, timeout: timedelta) -> HostMemory:
    return wrap_host_memory(open_nccl(device, timeout), device, timeout_sec=timeout.total_seconds())
