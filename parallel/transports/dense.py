"""All-reduce of a batch's messages in one hop through pinned host memory, an eighth of it flags (dense_call.cuh).

Between what slots of half flags carry best (host_memory.py) and what pays for two steps (two_step.py). Exact, or with
numbers rounded to 8 bits on their way, which moves seven twelfths of the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.transports.channel import REDUCTIONS, Channel, OverChannel, open_channel, reduce_aligned
from parallel.transports.region_layout import MAX_RANKS, PAGE_BYTES, UNIT_BYTES
from parallel.transports.shared_region import SharedRegion
from parallel.units import KIB

MAX_BYTES = 2048 * KIB
LANES = 32
LINE_BYTES = 16
NUM_TAGS = 65535


@dataclass(frozen=True)
class LineFormat:
    """What the lines of a message carry, and the kernels for it.

    Args:
        units: of 16 bytes of the message, in the lines of one lane in a tile.
        lines: of one lane in a tile.
        launches: (up to so many bytes of message, blocks, warps a block), ascending.
    """

    name: str
    source: str
    units: int
    lines: int
    dtypes: tuple[torch.dtype, ...]
    launches: tuple[tuple[int, int, int], ...]

    @property
    def tile_bytes(self) -> int:
        """Of the message, in what a warp carries at a time."""
        return self.units * LANES * UNIT_BYTES

    @property
    def tiles_per_page(self) -> int:
        return PAGE_BYTES // (self.lines * LANES * LINE_BYTES)


EXACT = LineFormat(
    "host_memory_dense",
    "host_memory_dense.cu",
    units=7,
    lines=8,
    dtypes=tuple(REDUCTIONS),
    # So many warps have what the link carries in one round trip on their way; with more, more is written before the
    # first is read, and the link is used one way for longer. Between two H200 over PCIe 5.0, by KiB in us: 16 in 4.0,
    # 64 in 6.4, 128 in 9.0, 256 in 12.7; 512 in 19.6 (21.3 with 48 warps), 1024 in 35.5, 2048 in 63.6.
    launches=((256 * KIB, 48, 1), (MAX_BYTES, 32, 1)),
)
# A number of 16 bits becomes one of 8, and twelve share a scale: host_memory_int8.cu, and in torch rounded.py.
INT8 = LineFormat(
    "host_memory_int8",
    "host_memory_int8.cu",
    units=3,
    lines=2,
    dtypes=(torch.bfloat16, torch.float16),
    # Small tiles: a warp takes 5 us to round and to add up four times as much. By KiB in us: 16 in 4.7, 64 in 5.5, 128
    # in 7.0, 256 in 9.6, 512 in 15.0, 2048 in 42.7.
    launches=((MAX_BYTES, 32, 3),),
)


@dataclass(frozen=True)
class DenseLayout:
    """Where things lie in the region: a page of error words, then each rank's two slots; all in bytes."""

    world_size: int
    max_bytes: int = MAX_BYTES
    lines: LineFormat = EXACT

    def __post_init__(self) -> None:
        assert 2 <= self.world_size <= MAX_RANKS, self.world_size
        assert self.max_bytes >= UNIT_BYTES, self.max_bytes
        # Each slot is used by every other call, and a call renews one row.
        assert 2 * self.slot_rows < NUM_TAGS, self.max_bytes

    @property
    def slot_tiles(self) -> int:
        # Whole pages, so that each lies near the processor of the rank that writes it.
        per_page = self.lines.tiles_per_page
        return -(-self.max_bytes // (per_page * self.lines.tile_bytes)) * per_page

    @property
    def slot_rows(self) -> int:
        return self.slot_tiles * self.lines.lines

    @property
    def slot_bytes(self) -> int:
        return self.slot_tiles // self.lines.tiles_per_page * PAGE_BYTES

    @property
    def num_bytes(self) -> int:
        return self.own(self.world_size)[0]

    def own(self, rank: int) -> tuple[int, int]:
        return PAGE_BYTES + 2 * rank * self.slot_bytes, PAGE_BYTES + 2 * (rank + 1) * self.slot_bytes


def choose_launch(num_bytes: int, lines: LineFormat) -> tuple[int, int]:
    """Blocks and threads for a message; no more warps than have a tile to carry."""
    tiles = -(-num_bytes // lines.tile_bytes)
    most, warps = next((blocks, warps) for up_to, blocks, warps in lines.launches if num_bytes <= up_to)
    blocks = min(most, tiles)
    return blocks, LANES * min(warps, -(-tiles // blocks))


class DenseChannel(Channel[DenseLayout]):
    """All-reduce of up to `layout.max_bytes` in whole units, on tensors that are contiguous and aligned to 16 bytes."""

    def __init__(
        self, region: SharedRegion, layout: DenseLayout, rank: int, device: torch.device, *, timeout_sec: float
    ) -> None:
        self.source = layout.lines.source
        self.names = tuple(REDUCTIONS[dtype] for dtype in layout.lines.dtypes)
        super().__init__(region, layout, rank, device, timeout_sec=timeout_sec)

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """Sum over the ranks of `source`, into `target`, which may be the same."""
        size, tiles = source.nbytes, self.layout.slot_tiles
        self.launch(REDUCTIONS[source.dtype], source, target, size, tiles, *choose_launch(size, self.layout.lines))


class DenseHostMemory(OverChannel[DenseChannel]):
    """All-reduces of whole units of up to `max_bytes` in one hop through host memory, the rest through `inner`."""

    def __init__(self, inner: Communicator, channel: DenseChannel) -> None:
        super().__init__(inner, channel)
        self.name, self.dtypes = channel.layout.lines.name, channel.layout.lines.dtypes
        self.max_bytes = channel.layout.max_bytes

    def all_reduce(self, tensor: Tensor) -> Tensor:
        # By what all ranks know: the length and the type, not where the tensor lies.
        whole = tensor.nbytes % UNIT_BYTES == 0 and 0 < tensor.nbytes <= self.max_bytes
        if tensor.dtype not in self.dtypes or not whole:
            return self.inner.all_reduce(tensor)
        return reduce_aligned(self.channel.all_reduce, tensor, UNIT_BYTES)


def wrap_dense(
    inner: Communicator,
    device: torch.device,
    *,
    timeout_sec: float,
    max_bytes: int = MAX_BYTES,
    lines: LineFormat = EXACT,
) -> DenseHostMemory:
    """Opens slots for all ranks of `inner`, which carries what they do not.

    Raises:
        TransportError: as `open_channel`.
    """
    layout = DenseLayout(inner.world_size, max_bytes, lines)
    return DenseHostMemory(inner, open_channel(DenseChannel, inner, device, layout, timeout_sec=timeout_sec))


def wrap_int8(inner: Communicator, device: torch.device, *, timeout_sec: float) -> DenseHostMemory:
    """As `wrap_dense`, with numbers rounded to 8 bits on their way."""
    return wrap_dense(inner, device, timeout_sec=timeout_sec, lines=INT8)
