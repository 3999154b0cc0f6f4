"""All-reduce of large messages by the copy engines of the cards, through slots in pinned host memory.

It leaves the multiprocessors to whatever runs beside it, but for the sums, so that it is worth most beside products.
The order of all that it does is in copy_plan.py. Calls may come on any stream, each rank's in one order, and one may
begin before another has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.transports.channel import REDUCTIONS, Channel, OverChannel, is_aligned, open_channel, reduce_aligned
from parallel.transports.copy_layout import MEETINGS, CopyLayout, choose_layout
from parallel.transports.copy_plan import next_lane
from parallel.transports.copy_streams import PARAMETERS, CardStreams
from parallel.transports.copy_watch import CopyWatch
from parallel.transports.region_layout import ERROR_STRIDE, UNIT_BYTES
from parallel.transports.shared_region import SharedRegion


class CopyChannel(Channel[CopyLayout]):
    """All-reduce of any length that is a multiple of 16 bytes, on tensors that are contiguous and aligned to 16."""

    source = "host_memory_copies.cu"
    parameters = PARAMETERS

    def __init__(
        self, region: SharedRegion, layout: CopyLayout, rank: int, device: torch.device, *, timeout_sec: float
    ) -> None:
        ranks = range(layout.world_size)
        meetings = [
            [[region.word(layout.flag(lane, meeting, writer, reader)) for reader in ranks] for writer in ranks]
            for lane in range(layout.num_lanes)
            for meeting in MEETINGS
        ]
        progress = [region.word(layout.progress(each)) for each in ranks]
        errors = [region.word(each * ERROR_STRIDE) for each in ranks]
        self.watch = CopyWatch(rank, meetings, progress, errors, timeout_sec)
        super().__init__(region, layout, rank, device, timeout_sec=timeout_sec)
        self.streams = CardStreams(region, layout, rank, device, self.state.data_ptr())
        self.device, self.lane = device, 0
        self.watch.start()

    @property
    def timeout_sec(self) -> float:
        return self.watch.timeout_sec

    @timeout_sec.setter
    def timeout_sec(self, value: float) -> None:
        self.watch.timeout_sec = value

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """Sum over the ranks of `source`, into `target`, which may be the same."""
        self.join(self.start(source, target))

    def start(self, source: Tensor, target: Tensor) -> dict[int, int]:
        """The same, once the current stream comes to it; the events of its end, for `join`, by lane.

        Keep both until they were waited for.
        """
        kernel, stream = self.kernels[REDUCTIONS[source.dtype]], self.current_stream()
        first, self.lane = self.lane, next_lane(self.layout, source.nbytes, self.lane)
        return self.streams.start(source.nbytes, first, kernel, source.data_ptr(), target.data_ptr(), stream)

    def join(self, ends: Mapping[int, int]) -> None:
        """What the current stream is given from now on comes after `ends`."""
        self.streams.wait(ends.values(), self.current_stream())

    def current_stream(self) -> int:
        stream: int = torch._C._cuda_getCurrentRawStream(self.device.index)
        return stream

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
        # Of sums that were started since the last join, by lane.
        self.ends: dict[int, int] = {}

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if not self.takes(tensor):
            return self.inner.all_reduce(tensor)
        return reduce_aligned(self.channel.all_reduce, tensor, UNIT_BYTES)

    def start_all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        """Sums up in place a tensor that `can_start`, once the current stream comes to it.

        Keep it until the result is called: what the current stream is given from then on comes after the sum.
        """
        ends = self.channel.start(tensor, tensor)
        self.ends |= ends
        return partial(self.channel.join, ends)

    def join(self) -> None:
        """What the current stream is given from now on comes after all sums that were started.

        Not where it is captured: a graph cannot wait for what is not in it, and all that was queued before a capture is
        done by then.
        """
        if self.copies_now():
            self.channel.join(self.ends)
        self.ends = {}

    def can_start(self, tensor: Tensor) -> bool:
        return self.takes(tensor) and is_aligned(tensor, UNIT_BYTES)

    def takes(self, tensor: Tensor) -> bool:
        """By what all ranks know: the length and the type, not where the tensor lies."""
        if tensor.dtype not in REDUCTIONS or tensor.nbytes < self.min_bytes or tensor.nbytes % UNIT_BYTES:
            return False
        return self.copies_now()

    @staticmethod
    def copies_now() -> bool:
        return not torch.cuda.is_current_stream_capturing()


def wrap_copies(
    inner: Communicator, device: torch.device, *, timeout_sec: float, layout: CopyLayout | None = None
) -> CopiedHostMemory:
    """Opens slots for all ranks of `inner`, which carries all but large all-reduces.

    Raises:
        TransportError: as `open_channel`; also where the driver cannot write and await flags in a stream.
    """
    chosen = layout or choose_layout(inner.world_size)
    return CopiedHostMemory(inner, open_channel(CopyChannel, inner, device, chosen, timeout_sec=timeout_sec))
