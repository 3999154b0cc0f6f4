"""Small collectives in one kernel, through slots in pinned host memory that every card reads (host_memory.cu).

Cards without peer access, as RTX 4090s, reach one another only through the host. NCCL's path there costs 24.7 us for
the message of a decode step, a kernel of this kind 4.3 us (two H200, 16 KiB).

Why two slots a rank are enough: a card that runs call e + 1 has finished call e, for which it read a line of every
peer's call e. A peer writes those after its call e - 1 has ended, since calls of a rank run one after the other on its
card. So when anyone overwrites the slot of call e - 1 with call e + 1, everyone has read it. Every call reads every
peer, so this holds whatever the sizes and grids of the calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from parallel.communicator import Communicator, TransportError
from parallel.transports.shared_region import SharedRegion, raise_everywhere, share_region
from parallel.transports.torch_distributed import open_nccl

KIB = 1024
PAGE_BYTES = 4096
ERROR_STRIDE = 64
DATA_BYTES = 8
LINE_BYTES = 16
MAX_RANKS = 4
# What a slot can carry; the choice of transport finds out by measurement up to which size it pays.
MAX_BYTES = 512 * KIB
# (up to so many bytes, blocks, threads), on an H200 at PCIe 5.0: 4.3 us, 7.6 us and 20.5 us at these sizes.
LAUNCHES = ((16 * KIB, 8, 256), (64 * KIB, 16, 256), (256 * KIB, 32, 512), (MAX_BYTES, 64, 512))
REDUCTIONS = {
    torch.bfloat16: "reduce_bfloat16",
    torch.float16: "reduce_float16",
    torch.float32: "reduce_float32",
}
GATHER = "gather_bytes"
# The kernel takes its limit as 32 bits.
MAX_TIMEOUT_MS = 2**31 - 1


@dataclass(frozen=True)
class Layout:
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

    def error(self, rank: int) -> int:
        return rank * ERROR_STRIDE


def choose_launch(num_bytes: int) -> tuple[int, int]:
    """Blocks and threads for a message, from `LAUNCHES`; no more blocks than have a line to carry."""
    lines = -(-num_bytes // DATA_BYTES)
    blocks, threads = next((blocks, threads) for most, blocks, threads in LAUNCHES if num_bytes <= most)
    return min(blocks, -(-lines // threads)), threads


@cache
def compile_kernel(name: str, world_size: int, device_index: int) -> Callable[..., None]:
    """A kernel of host_memory.cu, compiled for the card of this process."""
    source = (Path(__file__).parent / "host_memory.cu").read_text(encoding="utf-8")
    kernel: Callable[..., None] = torch.cuda._compile_kernel(source, name, nvcc_options=[f"-DWORLD={world_size}"])
    return kernel


class Channel:
    """One rank's end of a registered region: its state on the card, and the launches.

    Calls must follow one another on the card, as on one stream; every rank makes the same ones.
    """

    def __init__(
        self, region: SharedRegion, layout: Layout, rank: int, device: torch.device, *, timeout_sec: float
    ) -> None:
        self.region, self.layout, self.rank = region, layout, rank
        self.timeout_sec = timeout_sec
        # Epoch and arrivals, then the peer that did not answer, plus one.
        self.state = torch.zeros(2, dtype=torch.int64, device=device)
        self.error = region.word(layout.error(rank))
        # All of them now: loading code needs the card, which may be waiting for a peer later.
        names = (*REDUCTIONS.values(), GATHER)
        self.kernels = {name: compile_kernel(name, layout.world_size, device.index) for name in names}

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """Sum over the ranks of `source`, into `target` (it may be the same); both contiguous, aligned to 8 bytes."""
        self._launch(REDUCTIONS[source.dtype], source, target)

    def all_gather(self, source: Tensor, target: Tensor) -> None:
        """`source` of each rank into `target`, [world_size, ...]; both contiguous, aligned to 8 bytes."""
        self._launch(GATHER, source, target)

    def _launch(self, name: str, source: Tensor, target: Tensor) -> None:
        blocks, threads = choose_launch(source.nbytes)
        address = self.region.device_address
        timeout_ms = min(MAX_TIMEOUT_MS, max(1, round(self.timeout_sec * 1e3)))
        args = [source, target, self.state, address & 0xFFFFFFFF, address >> 32, source.nbytes, self.layout.slot_lines,
                self.rank, timeout_ms]  # fmt: skip
        self.kernels[name](grid=(blocks, 1, 1), block=(threads, 1, 1), args=args)

    def check(self) -> None:
        """Raises TransportError if a call that the card has run was given up for want of a peer's answer."""
        missing = self.error.value
        if missing:
            raise TransportError(
                f"rank {missing - 1} did not answer rank {self.rank} through host memory within {self.timeout_sec:g} s "
                "(timeouts.collective_sec; a quarter of timeouts.selftest_sec in the self-test). Its log says what it "
                "was doing; engine.transport=nccl avoids host memory."
            )


class HostMemory:
    """Messages of up to `max_bytes` through host memory, larger ones and other types through `inner`."""

    name = "host_memory"

    def __init__(self, inner: Communicator, channel: Channel) -> None:
        self.inner, self.channel = inner, channel
        self.rank, self.world_size = inner.rank, inner.world_size
        self.capturable = inner.capturable
        self.max_bytes = channel.layout.max_bytes

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if tensor.dtype not in REDUCTIONS or not 0 < tensor.nbytes <= self.max_bytes:
            return self.inner.all_reduce(tensor)
        if is_plain(tensor):
            self.channel.all_reduce(tensor, tensor)
            return tensor
        copy = plain_copy(tensor)
        self.channel.all_reduce(copy, copy)
        return tensor.copy_(copy)

    def all_gather(self, tensor: Tensor) -> Tensor:
        if not 0 < tensor.nbytes <= self.max_bytes:
            return self.inner.all_gather(tensor)
        gathered = tensor.new_empty(self.world_size, *tensor.shape)
        self.channel.all_gather(tensor if is_plain(tensor) else plain_copy(tensor), gathered)
        return gathered

    def barrier(self) -> None:
        # In this order a lost peer is an error here and not another wait in `inner`.
        torch.cuda.synchronize(self.channel.state.device)
        self.check()
        self.inner.barrier()

    def check(self) -> None:
        self.channel.check()
        self.inner.check()


def is_plain(tensor: Tensor) -> bool:
    """Whether the kernel can take `tensor` where it lies."""
    return tensor.is_contiguous() and tensor.data_ptr() % DATA_BYTES == 0


def plain_copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def wrap_host_memory(
    inner: Communicator, device: torch.device, *, timeout_sec: float, max_bytes: int = MAX_BYTES
) -> HostMemory:
    """Opens slots for all ranks of `inner`, which carries what is too large for them.

    Raises:
        TransportError: on every rank, if one of them cannot map or register the memory or compile the kernels.
    """
    layout = Layout(inner.world_size, max_bytes)
    region = share_region(inner, device, layout.num_bytes)
    region.touch(layout.slot(inner.rank, 0), layout.slot(inner.rank, 0) + 2 * layout.slot_bytes)
    # Registration brings in the pages that nobody has touched.
    inner.barrier()
    channel, problem = None, ""
    try:
        region.register()
        channel = Channel(region, layout, inner.rank, device, timeout_sec=timeout_sec)
    except Exception as error:  # The driver refuses the memory; NVRTC is missing or refuses the code.
        problem = first_line(error)
    raise_everywhere(inner, device, problem)
    assert channel is not None
    return HostMemory(inner, channel)


def first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0].removesuffix(".")


def open_host_memory(device: torch.device, timeout: timedelta) -> HostMemory:
    return wrap_host_memory(open_nccl(device, timeout), device, timeout_sec=timeout.total_seconds())
