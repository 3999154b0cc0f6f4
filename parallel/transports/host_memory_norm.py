"""All-reduce, residual sum and RMS norm of the rows of a decode step in one kernel (host_memory_norm.cu)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.kernels.fused import MAX_HIDDEN, PIECE, PIECE_BYTES, WARP
from parallel.transports.channel import Channel, OverChannel, aligned, open_channel
from parallel.transports.region_layout import MAX_RANKS, PAGE_BYTES
from parallel.transports.shared_region import SharedRegion
from parallel.units import KIB

NAME = "host_memory_norm"
KERNEL = "reduce_bfloat16_and_norm"
# Update, residual, weight, out, state, sums, region; pieces, lines of a slot, blocks a row, rank, limit, eps.
PARAMETERS = "PPPPPPPiiiiif"
# Whether a run tries it; False leaves all-reduce and norm to their own kernels.
ENABLED = True
# As in host_memory_norm.cu: of each thread; MAX_WARPS as in ../kernels/norm.cuh.
VECTORS, LINES, LINE_BYTES = 2, 3, 16
MAX_WARPS = 32
MAX_THREADS = 512
MAX_ROWS = 32
# A row of up to 8192 numbers in one block needs no meeting of blocks, which takes about what reading from more
# multiprocessors at once could save; tools/bench/all_reduce.py --cards times others.
ROW_BLOCKS = 1


@dataclass(frozen=True)
class NormLayout:
    """A page of error words, then each rank's two slots; all in bytes. A slot takes rows of `max_bytes` in all."""

    world_size: int
    max_bytes: int = 512 * KIB

    def __post_init__(self) -> None:
        assert 2 <= self.world_size <= MAX_RANKS, self.world_size
        assert self.max_bytes > 0 and self.max_bytes % (2 * PAGE_BYTES) == 0, self.max_bytes

    @property
    def slot_bytes(self) -> int:
        return self.max_bytes // (VECTORS * PIECE_BYTES) * LINES * LINE_BYTES

    @property
    def slot_lines(self) -> int:
        return self.slot_bytes // LINE_BYTES

    @property
    def num_bytes(self) -> int:
        return self.own(self.world_size)[0]

    def own(self, rank: int) -> tuple[int, int]:
        return PAGE_BYTES + 2 * rank * self.slot_bytes, PAGE_BYTES + 2 * (rank + 1) * self.slot_bytes

    def takes(self, rows: int, hidden_size: int) -> bool:
        """Whether so many rows have threads, and lines in a slot."""
        fits_row = 0 < hidden_size <= MAX_HIDDEN and hidden_size % PIECE == 0
        return fits_row and 0 < rows <= MAX_ROWS and rows * row_threads(hidden_size) * LINES <= self.slot_lines


def row_threads(hidden_size: int) -> int:
    """Those that hold a row, as fused.norm_kernel has them."""
    return -(-hidden_size // (PIECE * VECTORS * WARP)) * WARP


def choose_row_blocks(hidden_size: int) -> int:
    """The fewest blocks a row from `ROW_BLOCKS` on that share its warps evenly and are not too large; or one a warp."""
    warps = row_threads(hidden_size) // WARP
    even = (blocks for blocks in range(ROW_BLOCKS, warps) if warps % blocks == 0)
    return next((blocks for blocks in even if warps // blocks * WARP <= MAX_THREADS), warps)


class NormChannel(Channel[NormLayout]):
    """Rows of bfloat16 that `layout` takes, in tensors that are contiguous and aligned to 16 bytes."""

    source = "host_memory_norm.cu"
    names = (KERNEL,)
    parameters = PARAMETERS

    def __init__(
        self, region: SharedRegion, layout: NormLayout, rank: int, device: torch.device, *, timeout_sec: float
    ) -> None:
        super().__init__(region, layout, rank, device, timeout_sec=timeout_sec)
        self.sums = torch.zeros(MAX_ROWS * MAX_WARPS, dtype=torch.int64, device=device)

    def all_reduce_add_norm(self, update: Tensor, residual: Tensor, weight: Tensor, output: Tensor, eps: float) -> None:
        """Adds the sum over the ranks of `update` [rows, H] to `residual`; `output`: its norm, times `weight` [H]."""
        rows, hidden_size = update.shape
        row_blocks = choose_row_blocks(hidden_size)
        self.kernels[KERNEL](
            (rows * row_blocks, 1, 1),
            row_threads(hidden_size) // row_blocks,
            update,
            residual,
            weight,
            output,
            self.state,
            self.sums,
            self.region.device_address,
            hidden_size // PIECE,
            self.layout.slot_lines,
            row_blocks,
            self.rank,
            self.timeout_ms,
            eps,
        )


class NormHostMemory(OverChannel[NormChannel]):
    """`inner`, whose all-reduces of up to `max_bytes` that a norm follows are one kernel with it."""

    def __init__(self, inner: Communicator, channel: NormChannel) -> None:
        super().__init__(inner, channel)
        self.name = inner.name
        self.max_bytes = channel.layout.max_bytes

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self.inner.all_reduce(tensor)

    def all_reduce_add_norm(self, update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        # By what all ranks know: shape and type, not where the tensors lie.
        takes = update.dtype == residual.dtype == weight.dtype == torch.bfloat16 and update.dim() == 2
        if not takes or update.nbytes > self.max_bytes or not self.channel.layout.takes(*update.shape):
            return self.inner.all_reduce_add_norm(update, residual, weight, eps)
        output = torch.empty_like(update, memory_format=torch.contiguous_format)
        update, there, weight = (aligned(each, PIECE_BYTES) for each in (update, residual, weight))
        self.channel.all_reduce_add_norm(update, there, weight, output, eps)
        if there is not residual:
            residual.copy_(there)
        return output


def wrap_norm(inner: Communicator, device: torch.device, *, timeout_sec: float) -> NormHostMemory:
    """Opens slots for all ranks of `inner`, which does all but sums that a norm follows.

    Raises:
        TransportError: as `open_channel`.
    """
    layout = NormLayout(inner.world_size)
    return NormHostMemory(inner, open_channel(NormChannel, inner, device, layout, timeout_sec=timeout_sec))
