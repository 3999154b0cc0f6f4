"""All-reduce of large messages through pinned host memory, in two steps: sums of parts, then their exchange.

Each rank sends the others what they sum up and reads back the sums (host_memory_two_step.cu), so that each card's link
carries the message about once in each direction, both at a time. A message longer than a slot goes in pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.transports.channel import REDUCTIONS, Channel, OverChannel, open_channel, reduce_aligned
from parallel.transports.region_layout import MAX_RANKS, PAGE_BYTES, UNIT_BYTES
from parallel.units import MIB

PIECE_BYTES = 8 * MIB
# As in host_memory_two_step.cu.
THREADS = 512
CHUNK_BYTES = THREADS * 4 * UNIT_BYTES
MAX_CHUNKS = 256
FLAG_BYTES = 4
# For messages of up to so many bytes, and for all larger. 16 are enough to have both directions of a PCIe 5.0 link full
# of requests: 32 were no faster (32 MiB in 1.07 ms), and took twice as many multiprocessors from the products beside
# them. 8 are slower by themselves, but beside products, on two H200, a pass of 512 tokens of a 70B, with sums of 4 MiB,
# took 87.3 ms where 16 took 101.5; one of 1024, with sums of 8 MiB, 202 where 16 took 175.
FEW_BLOCKS, MOST_BYTES_OF_FEW = 8, 4 * MIB
BLOCKS = 16


@dataclass(frozen=True)
class TwoStepLayout:
    """A page of error words, the flags, then for each rank two slots and two slots of sums, half as large; in bytes."""

    world_size: int
    piece_bytes: int = PIECE_BYTES

    def __post_init__(self) -> None:
        assert 2 <= self.world_size <= MAX_RANKS, self.world_size
        assert self.piece_bytes % (2 * PAGE_BYTES) == 0, self.piece_bytes
        assert self.piece_bytes // 2 <= MAX_CHUNKS * CHUNK_BYTES, self.piece_bytes

    @property
    def slot_units(self) -> int:
        return self.piece_bytes // UNIT_BYTES

    @property
    def start(self) -> int:
        # Whole pages, so that slots are.
        return PAGE_BYTES + 2 * MAX_RANKS * MAX_CHUNKS * FLAG_BYTES

    @property
    def num_bytes(self) -> int:
        return self.own(self.world_size)[0]

    def own(self, rank: int) -> tuple[int, int]:
        area = 3 * self.piece_bytes
        return self.start + rank * area, self.start + (rank + 1) * area


def blocks_for(num_bytes: int) -> int:
    """Blocks that a message of so many bytes takes, each a multiprocessor by itself."""
    return FEW_BLOCKS if num_bytes <= MOST_BYTES_OF_FEW else BLOCKS


class TwoStepChannel(Channel[TwoStepLayout]):
    """All-reduce of any length that is a multiple of 16 bytes, on tensors that are contiguous and aligned to 16."""

    source = "host_memory_two_step.cu"

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """Sum over the ranks of `source`, into `target`, which may be the same."""
        piece = self.layout.piece_bytes // source.element_size()
        for start in range(0, source.numel(), piece):
            part, result = source.view(-1)[start : start + piece], target.view(-1)[start : start + piece]
            chunks = -(-part.nbytes // (self.layout.world_size * CHUNK_BYTES))
            self.launch(
                REDUCTIONS[source.dtype],
                part,
                result,
                part.nbytes,
                self.layout.slot_units,
                min(blocks_for(source.nbytes), chunks),
                THREADS,
            )


class TwoStepHostMemory(OverChannel[TwoStepChannel]):
    """All-reduces from `min_bytes` on through host memory in two steps, everything else through `inner`."""

    name = "host_memory_two_step"

    def __init__(self, inner: Communicator, channel: TwoStepChannel) -> None:
        super().__init__(inner, channel)
        self.min_bytes = UNIT_BYTES

    def all_reduce(self, tensor: Tensor) -> Tensor:
        # By what all ranks know: the length and the type, not where the tensor lies.
        if tensor.dtype not in REDUCTIONS or tensor.nbytes < self.min_bytes or tensor.nbytes % UNIT_BYTES:
            return self.inner.all_reduce(tensor)
        return reduce_aligned(self.channel.all_reduce, tensor, UNIT_BYTES)


def wrap_two_step(inner: Communicator, device: torch.device, *, timeout_sec: float) -> TwoStepHostMemory:
    """Opens slots for all ranks of `inner`, which carries all but large all-reduces.

    Raises:
        TransportError: as `open_channel`.
    """
    layout = TwoStepLayout(inner.world_size)
    return TwoStepHostMemory(inner, open_channel(TwoStepChannel, inner, device, layout, timeout_sec=timeout_sec))
