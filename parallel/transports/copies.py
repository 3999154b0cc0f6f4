"""All-reduce of large messages by the copy engines of the cards, through slots in pinned host memory.

It leaves the multiprocessors to whatever runs beside it, but for the sums, so that it is worth most on a stream of its
own. The order of all that it does is in copy_plan.py. Calls may come on any stream, each rank's in one order; they
are queued behind one another. It cannot be captured in a graph: its flags count calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.transports.channel import ERROR_STRIDE, REDUCTIONS, Channel, OverChannel, open_channel, reduce_aligned
from parallel.transports.copy_layout import COUNTS, LANES, UNIT_BYTES, CopyLayout, choose_layout
from parallel.transports.copy_plan import plan_all_reduce
from parallel.transports.copy_streams import Call, CardStreams
from parallel.transports.copy_watch import CopyWatch
from parallel.transports.shared_region import SharedRegion

# Of a sum: own, out, what came from the peers; units, units from one peer to the next, rank.
PARAMETERS = "PPPiii"


class CopyChannel(Channel[CopyLayout]):
    """All-reduce of any length that is a multiple of 16 bytes, on tensors that are contiguous and aligned to 16."""

    source = "host_memory_copies.cu"
    parameters = PARAMETERS

    def __init__(
        self, region: SharedRegion, layout: CopyLayout, rank: int, device: torch.device, *, timeout_sec: float
    ) -> None:
        flags = [[region.word(layout.flag(each, lane)) for lane in LANES] for each in range(layout.world_size)]
        errors = [region.word(each * ERROR_STRIDE) for each in range(layout.world_size)]
        self.watch = CopyWatch(rank, flags, errors, timeout_sec)
        super().__init__(region, layout, rank, device, timeout_sec=timeout_sec)
        self.streams = CardStreams(region, layout, rank, device)
        self.segments = 0
        self.watch.start()

    @property
    def timeout_sec(self) -> float:
        return self.watch.timeout_sec

    @timeout_sec.setter
    def timeout_sec(self, value: float) -> None:
        self.watch.timeout_sec = value

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """Sum over the ranks of `source`, into `target`, which may be the same."""
        plan = plan_all_reduce(self.layout, self.rank, source.nbytes, self.segments)
        counts = tuple(self.watch.queued)
        kernel = self.kernels[REDUCTIONS[source.dtype]]
        # First: what is queued must be what a release goes beyond.
        self.watch.queued = [(count + more) % COUNTS for count, more in zip(counts, plan.raised, strict=True)]
        self.segments = (self.segments + plan.num_segments) % self.layout.num_slots
        self.streams.run(plan.operations, Call(source.data_ptr(), target.data_ptr(), kernel, counts))

    def close(self) -> None:
        super().close()
        self.watch.stop()
        self.streams.free()

    def check(self) -> None:
        """As of any channel; also if another rank has given up, since sums are wrong everywhere after that."""
        failure = self.watch.failure()
        if failure is not None:
            raise self.not_answered(*failure)


class CopiedHostMemory(OverChannel[CopyChannel]):
    """All-reduces from `min_bytes` on by copy engines, everything else, and what is captured, through `inner`."""

    name = "host_memory_copies"

    def __init__(self, inner: Communicator, channel: CopyChannel) -> None:
        super().__init__(inner, channel)
        self.min_bytes = UNIT_BYTES

    def all_reduce(self, tensor: Tensor) -> Tensor:
        # By what all ranks know: the length and the type, not where the tensor lies.
        if tensor.dtype not in REDUCTIONS or tensor.nbytes < self.min_bytes or tensor.nbytes % UNIT_BYTES:
            return self.inner.all_reduce(tensor)
        if torch.cuda.is_current_stream_capturing():
            return self.inner.all_reduce(tensor)
        return reduce_aligned(self.channel.all_reduce, tensor, UNIT_BYTES)


def wrap_copies(
    inner: Communicator, device: torch.device, *, timeout_sec: float, layout: CopyLayout | None = None
) -> CopiedHostMemory:
    """Opens slots for all ranks of `inner`, which carries all but large all-reduces.

    Raises:
        TransportError: as `open_channel`; also where the driver cannot write and await flags in a stream.
    """
    chosen = layout or choose_layout(inner.world_size)
    return CopiedHostMemory(inner, open_channel(CopyChannel, inner, device, chosen, timeout_sec=timeout_sec))
