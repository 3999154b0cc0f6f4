"""One rank's end of a region of host memory: its state on the card, the launches, and the limit on its waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from parallel.communicator import Around, Communicator, TransportError
from parallel.kernels.launch import first_line, load_kernel
from parallel.transports.region_layout import ERROR_STRIDE, RegionLayout
from parallel.transports.shared_region import SharedRegion, raise_everywhere, share_region

REDUCTIONS = {
    torch.bfloat16: "reduce_bfloat16",
    torch.float16: "reduce_float16",
    torch.float32: "reduce_float32",
}
FOLDER = Path(__file__).parent
# Of kernels that talk: source, target, state, region; bytes, units of a slot, rank, limit.
PARAMETERS = "PPPPiiii"
# The kernels take their limit as 32 bits.
MAX_TIMEOUT_MS = 2**31 - 1


L = TypeVar("L", bound=RegionLayout)


class Channel(Generic[L]):
    """Launches the kernels of one source file over a registered region.

    Calls must follow one another on the card, as on one stream; every rank makes the same ones.
    """

    source: str
    names: Sequence[str] = tuple(REDUCTIONS.values())
    parameters = PARAMETERS

    def __init__(self, region: SharedRegion, layout: L, rank: int, device: torch.device, *, timeout_sec: float) -> None:
        self.region, self.layout, self.rank = region, layout, rank
        self.timeout_sec = timeout_sec
        # Epoch and arrivals, then the peer that did not answer, plus one.
        self.state = torch.zeros(2, dtype=torch.int64, device=device)
        self.error = region.word(rank * ERROR_STRIDE)
        # All of them now: loading code needs the card, which may be waiting for a peer later.
        path, options = FOLDER / self.source, (f"-DWORLD={layout.world_size}",)
        self.kernels = {name: load_kernel(path, name, options, self.parameters, device.index) for name in self.names}

    def launch(
        self, name: str, source: Tensor, target: Tensor, num_bytes: int, slot_size: int, blocks: int, threads: int
    ) -> None:
        region, limit = self.region.device_address, self.timeout_ms
        self.kernels[name](
            (blocks, 1, 1), threads, source, target, self.state, region, num_bytes, slot_size, self.rank, limit
        )

    @property
    def timeout_ms(self) -> int:
        """Of a wait for a peer, as kernels take it."""
        return min(MAX_TIMEOUT_MS, max(1, round(self.timeout_sec * 1e3)))

    def close(self) -> None:
        """Gives the memory back; nothing may be launched after it."""
        torch.cuda.synchronize(self.state.device)
        self.region.unregister()

    def check(self) -> None:
        """Raises TransportError if a call that the card has run was given up for want of a peer's answer."""
        missing = self.error.value
        if missing:
            raise self.not_answered(missing - 1, self.rank)

    def not_answered(self, missing: int, rank: int) -> TransportError:
        return TransportError(
            f"rank {missing} did not answer rank {rank} through host memory within {self.timeout_sec:g} s "
            "(timeouts.collective_sec; a quarter of timeouts.selftest_sec in the self-test). Its log says what it "
            "was doing; engine.transport=nccl avoids host memory."
        )


C = TypeVar("C", bound=Channel[Any])


class OverChannel(Around, Generic[C]):
    """What communicators over a channel have in common; `inner` carries what the channel does not."""

    def __init__(self, inner: Communicator, channel: C) -> None:
        super().__init__(inner)
        self.channel = channel

    def barrier(self) -> None:
        # In this order a lost peer is an error here and not another wait in `inner`.
        torch.cuda.synchronize(self.channel.state.device)
        self.check()
        self.inner.barrier()

    def check(self) -> None:
        self.channel.check()
        self.inner.check()


def reduce_aligned(reduce: Callable[[Tensor, Tensor], None], tensor: Tensor, alignment: int) -> Tensor:
    """`tensor`, reduced in place by `reduce(source, target)`; by way of a copy where it is not aligned."""
    there = aligned(tensor, alignment)
    reduce(there, there)
    return tensor if there is tensor else tensor.copy_(there)


def is_aligned(tensor: Tensor, alignment: int) -> bool:
    """Whether a kernel that reads so many bytes at a time can take `tensor` where it lies."""
    return tensor.is_contiguous() and tensor.data_ptr() % alignment == 0


def aligned(tensor: Tensor, alignment: int) -> Tensor:
    """`tensor`, or a copy where such a kernel cannot take it as it lies."""
    return tensor if is_aligned(tensor, alignment) else tensor.clone(memory_format=torch.contiguous_format)


def open_channel(
    kind: type[C], communicator: Communicator, device: torch.device, layout: RegionLayout, *, timeout_sec: float
) -> C:
    """A region for all ranks of `communicator`, registered, and this rank's end of it, a `kind` with that layout.

    Raises:
        TransportError: on every rank, if one of them cannot map or register the memory or compile the kernels.
    """
    region = share_region(communicator, device, layout.num_bytes)
    region.touch(*layout.own(communicator.rank))
    # Registration brings in the pages that nobody has touched.
    communicator.barrier()
    channel, problem = None, ""
    try:
        region.register()
        channel = kind(region, layout, communicator.rank, device, timeout_sec=timeout_sec)
    except Exception as error:  # The driver refuses the memory; NVRTC is missing or refuses the code.
        problem = first_line(error)
    try:
        raise_everywhere(communicator, device, problem)
    except TransportError:
        if channel is not None:
            channel.close()
        elif region.device_address:
            region.unregister()
        raise
    assert channel is not None
    return channel
