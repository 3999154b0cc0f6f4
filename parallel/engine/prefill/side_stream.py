"""All-reduces beside what the card computes meanwhile: on a stream of their own."""

from __future__ import annotations

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
    done: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """The tensor; what is queued on the current stream from now on comes after its sum."""
        if self.done is not None:
            torch.cuda.current_stream(self.tensor.device).wait_event(self.done)
        return self.tensor


class SideStream:
    """Of one device; where that has no streams, sums are there at once.

    A communicator's collectives must follow one another on the card: between the first start and `join`, everything
    goes through here.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device, priority=PRIORITY) if device.type == "cuda" else None

    def start_all_reduce(self, communicator: Communicator, tensor: Tensor) -> Sum:
        """Sums `tensor` over the ranks, in place, after what is queued on the current stream."""
        if self.stream is None:
            return Sum(communicator.all_reduce(tensor), None)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            return Sum(communicator.all_reduce(tensor), self.stream.record_event())

    def multiprocessors(self, communicator: Communicator, num_bytes: int) -> int:
        """About how many an all-reduce of so many bytes keeps from what goes on beside it."""
        if self.stream is None:
            return 0
        carrier = communicator.carrier(num_bytes) if isinstance(communicator, BySize) else communicator
        # Copies leave them all but for their sums, whose blocks of a warp fit in beside any other.
        is_copied = isinstance(carrier, CopiedHostMemory) and not torch.cuda.is_current_stream_capturing()
        return 0 if is_copied else blocks_for(num_bytes)

    def join(self) -> None:
        """What is queued on the current stream from now on comes after all sums."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


@cache
def side_stream(device: torch.device) -> SideStream:
    """The one of this device."""
    return SideStream(device)
