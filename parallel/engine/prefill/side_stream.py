"""All-reduces beside what the card computes meanwhile: on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.transports.by_size import BySize
from parallel.transports.copies import CopiedHostMemory
from parallel.transports.two_step import blocks_for

# The card starts the blocks of these kernels first, whenever some of its multiprocessors become free.
PRIORITY = -1


@dataclass(frozen=True)
class Sum:
    """An all-reduce under way. Its tensor's memory is in use until it was waited for: keep it until then."""

    tensor: Tensor
    # Makes the current stream wait for it.
    join: Callable[[], None] | None

    def wait(self) -> Tensor:
        """The tensor; what is queued on the current stream from now on comes after its sum."""
        if self.join is not None:
            self.join()
        return self.tensor


class SideStream:
    """Of one device; where that has no streams, sums are there at once.

    A communicator's collectives must follow one another on the card: between the first start and `join`, everything
    goes through here. Copies have streams of their own, on which a sum may begin before the one ahead has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device, priority=PRIORITY) if device.type == "cuda" else None
        # Those that carry sums on streams of their own.
        self.copies: set[CopiedHostMemory] = set()

    def start_all_reduce(self, communicator: Communicator, tensor: Tensor) -> Sum:
        """Sums `tensor` over the ranks, in place, after what is queued on the current stream."""
        if self.stream is None:
            return Sum(communicator.all_reduce(tensor), None)
        carrier = carrier_of(communicator, tensor.nbytes)
        if isinstance(carrier, CopiedHostMemory) and carrier.can_start(tensor):
            self.copies.add(carrier)
            return Sum(tensor, carrier.start_all_reduce(tensor))
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            summed, done = communicator.all_reduce(tensor), self.stream.record_event()
        return Sum(summed, lambda: torch.cuda.current_stream(self.device).wait_event(done))

    def multiprocessors(self, communicator: Communicator, num_bytes: int) -> int:
        """About how many an all-reduce of so many bytes keeps from what goes on beside it."""
        if self.stream is None:
            return 0
        carrier = carrier_of(communicator, num_bytes)
        # Copies leave them all but for their sums, whose blocks of a warp fit in beside any other.
        return 0 if isinstance(carrier, CopiedHostMemory) and carrier.copies_now() else blocks_for(num_bytes)

    def join(self) -> None:
        """What is queued on the current stream from now on comes after all sums."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            for each in self.copies:
                each.join()
            self.copies.clear()


def carrier_of(communicator: Communicator, num_bytes: int) -> Communicator:
    return communicator.carrier(num_bytes) if isinstance(communicator, BySize) else communicator


@cache
def side_stream(device: torch.device) -> SideStream:
    """The one of this device."""
    return SideStream(device)
