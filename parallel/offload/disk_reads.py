"""Reads layers from a checkpoint's files in an endless round, ahead of their use, through one ring of host buffers.

The order of passes is the order of the files' layers, and the first follows the last. Threads fill the ring as far as
there is room, which is that of one layer: while the card works through all that lies between two layers from the disk,
the second is read. The ring is all that this takes of host memory, however many layers lie on the disk.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint.chunks import Chunk, plan_chunks, read_chunk
from parallel.checkpoint.read import TensorSlice
from parallel.checkpoint.read_ahead import CHUNK_BYTES, NUM_THREADS
from parallel.formats.scheme import CheckpointError
from parallel.offload.host_memory import HostBuffer

# Each thread has one to fill while one waits to be copied.
MIN_BUFFERS = 2 * NUM_THREADS
# Device, inode, size in bytes, and time of the last change in nanoseconds.
Stamp = tuple[int, int, int, int]


@dataclass
class Buffer:
    """A piece of the ring; `copied`: on a card, when the last copy out of it is done."""

    memory: Tensor
    copied: torch.cuda.Event | None = None


class Stamps:
    """What a checkpoint's files are now: layers that are read later must come from the same."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.stamps = {file: stamp(file.stat()) for file in files}

    def check(self, descriptor: int, chunk: Chunk) -> None:
        """Raises CheckpointError: the open file is not the one that was there."""
        file = chunk.entry.file
        found = stamp(os.fstat(descriptor))
        if found != self.stamps[file]:
            before, now = self.stamps[file][2], found[2]
            sizes = f": it had {before} bytes and has {now}" if now != before else ""
            raise CheckpointError(
                f"{file} was changed or replaced after it was loaded{sizes}, and {chunk.entry.name} is read from it in "
                "every pass (offload.disk). Start the run again, and leave the files alone while it lasts."
            )


def stamp(status: os.stat_result) -> Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def drive_bytes() -> int | None:
    """What drives have given this process so far, the page cache left out, as the kernel counts it (a network's files
    and those in memory not among it); None where it does not tell."""
    with suppress(OSError):
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(counts["read_bytes"])
    return None


class DiskReads:
    """Hands out the tensors of `layers` in turn, round after round from the place last given to `start`.

    Args:
        layers: what to read of each, in order.
    """

    def __init__(self, layers: Sequence[Sequence[TensorSlice]], device: torch.device, stamps: Stamps) -> None:
        self.device, self.stamps = device, stamps
        self.layers = [[chunk for wanted in layer for chunk in plan_chunks(wanted, CHUNK_BYTES)] for layer in layers]
        self.layer_bytes = [sum(wanted.num_bytes for wanted in layer) for layer in layers]
        self.ring, buffer_bytes = open_ring(self.layers, device)
        self.free = deque(Buffer(memory) for memory in self.ring.memory.split(buffer_bytes))
        self.chunks: Iterator[Chunk] = iter(())
        self.reading: deque[tuple[Chunk, Buffer, Future[None]]] = deque()
        self.pool = ThreadPoolExecutor(NUM_THREADS, "disk", initializer=use_device, initargs=(device,))
        # Bytes asked for so far, and what drives had given before that.
        self.num_read = 0
        self.drive_before: int | None = None

    @property
    def ring_bytes(self) -> int:
        return self.ring.memory.nbytes

    @property
    def drive_share(self) -> float | None:
        """How much of what was read came from a drive, not from the page cache; None where that is not known."""
        given = drive_bytes()
        if given is None or self.drive_before is None or not self.num_read:
            return None
        return min(1.0, (given - self.drive_before) / self.num_read)

    def start(self, place: int) -> None:
        """Goes on with the layer at `place`, whatever was to come."""
        if not self.num_read:
            # What was loaded does not count.
            self.drive_before = drive_bytes()
        for _, _, future in self.reading:
            future.cancel()
        wait([future for _, _, future in self.reading])
        self.free.extend(buffer for _, buffer, _ in self.reading)
        self.reading.clear()
        self.chunks = (chunk for turn in count(place) for chunk in self.layers[turn % len(self.layers)])
        self.fill_ring()

    def take(self, wanted: TensorSlice) -> Tensor:
        """The next tensor, on the device; its bytes are those of the file.

        Raises:
            CheckpointError: they cannot be read, or the file has changed.
        """
        tensor = torch.empty(wanted.shape, dtype=wanted.dtype, device=self.device)
        place, first = tensor.view(-1).view(torch.uint8), 0
        while first < wanted.num_bytes:
            chunk, buffer, future = self.reading[0]
            assert chunk.entry is wanted.entry, f"{chunk.entry.name} is next, not {wanted.entry.name}"
            future.result()
            self.reading.popleft()
            self.copy(buffer, place[first : first + chunk.kept_bytes])
            first += chunk.kept_bytes
        return tensor

    def copy(self, buffer: Buffer, target: Tensor) -> None:
        """Queues a copy; the thread that fills the buffer next waits for its end, and nobody else."""
        target.copy_(buffer.memory[: target.nbytes], non_blocking=True)
        if self.device.type == "cuda":
            buffer.copied = buffer.copied or torch.cuda.Event()
            buffer.copied.record(torch.cuda.current_stream(self.device))
        self.free.append(buffer)
        self.fill_ring()

    def fill_ring(self) -> None:
        while self.free:
            chunk, buffer = next(self.chunks), self.free.popleft()
            self.num_read += chunk.num_rows * chunk.row_bytes
            self.reading.append((chunk, buffer, self.pool.submit(self.fill, chunk, buffer)))

    def fill(self, chunk: Chunk, buffer: Buffer) -> None:
        if buffer.copied is not None:
            buffer.copied.synchronize()
        read_chunk(chunk, buffer.memory.numpy(), self.stamps.check)


def open_ring(layers: Sequence[Sequence[Chunk]], device: torch.device) -> tuple[HostBuffer, int]:
    """Room for any one layer, in one piece that is pinned where the device is a card; and the size of a buffer of it.

    Raises:
        RuntimeError: it cannot be pinned.
    """
    size = max(chunk.kept_bytes for layer in layers for chunk in layer)
    return HostBuffer(max(MIN_BUFFERS, *map(len, layers)) * size, device), size


def use_device(device: torch.device) -> None:
    """In each thread: one that waits for a copy must not begin to use another card."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
