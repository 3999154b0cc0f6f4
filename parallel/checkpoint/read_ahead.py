"""Reads tensors ahead of their use: threads fill host buffers, the caller's thread copies them to the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from parallel.checkpoint.chunks import Chunk, new_bytes, plan_chunks, read_chunk
from parallel.checkpoint.read import TensorSlice

# results/read_cpu_202611.md: from the disk, 4 threads of 4 MiB get what any other number gets (3.6 to 4.1 GB/s), and
# more than reads of 16 MiB; O_DIRECT gets 2.5. That disk is a virtual one: an NVMe wants several reads under way.
NUM_THREADS = 4
CHUNK_BYTES = 4 * 2**20
# Of host memory that a rank's buffers take at most, pinned where the device is a card: at 3.5 GB/s a rank they fill
# while a linear is packed for 70 ms. On a CPU, loads with 64 to 256 MiB took the same time, with 512 MiB longer.
LIMIT_BYTES = 256 * 2**20
# Copies to a card that may be under way: one runs while the next is queued, and further buffers serve the disk.
MAX_COPIES = 2


class ReadAhead:
    """Context manager that hands out tensors in the order of `wanted`, whose bytes are read as buffers allow.

    The file is read in that order too. Leaving the context ends the threads, whatever is still to be read.

    Args:
        limit_bytes: what all buffers take together, unless two rows of a tensor take more.
    """

    def __init__(self, wanted: Iterable[TensorSlice], device: torch.device, limit_bytes: int = LIMIT_BYTES) -> None:
        self._device = device
        chunk_bytes = min(CHUNK_BYTES, limit_bytes // MAX_COPIES)
        self._chunks = deque(chunk for each in wanted for chunk in plan_chunks(each, chunk_bytes))
        largest = max((chunk.kept_bytes for chunk in self._chunks), default=1)
        # torch rounds pinned memory up to powers of two.
        self._buffer_bytes = 1 << (largest - 1).bit_length()
        self._spare_buffers = max(MAX_COPIES, limit_bytes // self._buffer_bytes)
        self._free: list[Tensor] = []
        self._reading: deque[tuple[Chunk, Tensor, Future[None]]] = deque()
        self._copying: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="read")
        # Seconds that `take` waited for bytes.
        self.wait_sec = 0.0

    def __enter__(self) -> ReadAhead:
        self._start_reads()
        return self

    def __exit__(self, *exc: object) -> None:
        # Buffers that copies give back are for none of them.
        self._chunks.clear()
        self._pool.shutdown(cancel_futures=True)
        self._finish_copies(0)
        self._reading.clear()
        self._free.clear()
        if self._device.type == "cuda":
            # torch would keep the pinned memory for itself, and gives back only what no stream may still read.
            # torch.cuda.graph calls the same.
            torch.cuda.current_stream(self._device).synchronize()
            torch._C._host_emptyCache()

    def take(self, wanted: TensorSlice) -> Tensor:
        """The next tensor, on the device; its bytes are those of the file.

        Raises:
            CheckpointError: they cannot be read.
        """
        tensor = torch.empty(wanted.shape, dtype=wanted.dtype, device=self._device)
        place = tensor.view(-1).view(torch.uint8)
        first = 0
        while first < wanted.num_bytes:
            chunk, buffer = self._next_read()
            assert chunk.entry is wanted.entry, f"{chunk.entry.name} is next, not {wanted.entry.name}"
            self._copy(buffer[: chunk.kept_bytes], place[first : first + chunk.kept_bytes], buffer)
            first += chunk.kept_bytes
        self._finish_copies(0)
        return tensor

    def _start_reads(self) -> None:
        """As many as there are buffers, in order."""
        while self._chunks and (self._free or self._spare_buffers):
            chunk, buffer = self._chunks.popleft(), self._free.pop() if self._free else self._new_buffer()
            self._reading.append((chunk, buffer, self._pool.submit(read_chunk, chunk, buffer.numpy())))

    def _new_buffer(self) -> Tensor:
        self._spare_buffers -= 1
        if self._device.type == "cuda":
            return torch.empty(self._buffer_bytes, dtype=torch.uint8, pin_memory=True)
        return torch.from_numpy(new_bytes(self._buffer_bytes))

    def _next_read(self) -> tuple[Chunk, Tensor]:
        chunk, buffer, future = self._reading.popleft()
        start = time.perf_counter()
        future.result()
        self.wait_sec += time.perf_counter() - start
        return chunk, buffer

    def _copy(self, source: Tensor, target: Tensor, buffer: Tensor) -> None:
        """The buffer is free again once the copy is done, which on a card is later."""
        target.copy_(source, non_blocking=True)
        if self._device.type != "cuda":
            self._reuse(buffer)
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._copying.append((buffer, event))
        self._finish_copies(MAX_COPIES - 1)

    def _finish_copies(self, num_left: int) -> None:
        while len(self._copying) > num_left:
            buffer, event = self._copying.popleft()
            event.synchronize()
            self._reuse(buffer)

    def _reuse(self, buffer: Tensor) -> None:
        self._free.append(buffer)
        self._start_reads()
