"""The pieces in which a slice of a stored tensor is read: ranges of its file, each of at most a buffer's size."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parallel.checkpoint.headers import TensorEntry
from parallel.checkpoint.read import TensorSlice
from parallel.formats.scheme import CheckpointError

Bytes = npt.NDArray[np.uint8]

# Rows that are cut are read whole, a block at a time, and copied out of it while it is in the core's cache.
BLOCK_BYTES = 256 * 2**10


@dataclass(frozen=True)
class Chunk:
    """Rows of a tensor, of `row_bytes` each, the first at `offset` of the file.

    Of each row the bytes from `first` to before `end` are wanted; where that is all of it, the rows are one range.
    """

    entry: TensorEntry
    offset: int
    num_rows: int
    row_bytes: int
    first: int
    end: int

    @property
    def kept_bytes(self) -> int:
        return self.num_rows * (self.end - self.first)


def plan_chunks(wanted: TensorSlice, chunk_bytes: int) -> Iterator[Chunk]:
    """The chunks of a slice, in the order of its bytes; none for an empty one. A row may exceed `chunk_bytes`."""
    if not wanted.num_bytes:
        return
    entry, ranges = wanted.entry, wanted.ranges
    assert wanted.shape[2:] == entry.shape[2:], f"{entry.name}: {wanted.slices=}"
    rows = ranges[0] if ranges else range(1)
    row_bytes = entry.num_bytes // math.prod(entry.shape[:1])
    columns = ranges[1] if len(ranges) > 1 else range(1)
    column_bytes = row_bytes // math.prod(entry.shape[1:2])
    start = entry.offset + rows.start * row_bytes
    if len(columns) * column_bytes == row_bytes:
        # One range, which may be cut anywhere.
        for first in range(0, wanted.num_bytes, chunk_bytes):
            size = min(chunk_bytes, wanted.num_bytes - first)
            yield Chunk(entry, start + first, 1, size, 0, size)
        return
    first, end = columns.start * column_bytes, columns.stop * column_bytes
    step = max(1, chunk_bytes // (end - first))
    for row in range(0, len(rows), step):
        yield Chunk(entry, start + row * row_bytes, min(step, len(rows) - row), row_bytes, first, end)


def read_chunk(
    chunk: Chunk, buffer: Bytes, check: Callable[[int, Chunk], None] = lambda descriptor, chunk: None
) -> None:
    """Fills the first `kept_bytes` of `buffer`.

    Args:
        check: called with the open file before it is read.

    Raises:
        CheckpointError: the file cannot be read, or ends before the chunk does.
    """
    try:
        # A descriptor each: the kernel keeps how far it reads ahead by descriptor.
        file = os.open(chunk.entry.file, os.O_RDONLY)
        try:
            check(file, chunk)
            read_rows(file, chunk, buffer[: chunk.kept_bytes])
        finally:
            os.close(file)
    except OSError as error:
        name, path = chunk.entry.name, chunk.entry.file
        raise CheckpointError(f"{name} in {path} cannot be read: {error.strerror}. Check the disk.") from error


def read_rows(file: int, chunk: Chunk, kept: Bytes) -> None:
    """Whole rows are one read. Of others the rest is read too, and left.

    The disk gives each byte once all the same: the other ranks find theirs in the page cache, which holds whole pages
    and is filled ahead. A call for each row gets no more: GB/s of kept bytes from the cache, two threads on two cores,
    rows of 4 / 16 / 56 KiB: halves kept, 11.0 / 11.0 / 10.8 whole and 1.5 / 6.6 / 12.8 a call each; quarters kept,
    8.2 / 6.8 / 6.6 and 0.6 / 1.7 / 3.6, because Python's lock changes hands at each call.
    """
    if chunk.end - chunk.first == chunk.row_bytes:
        fill(file, chunk, chunk.offset, kept)
        return
    by_row = kept.reshape(chunk.num_rows, -1)
    step = min(chunk.num_rows, max(1, BLOCK_BYTES // chunk.row_bytes))
    block = new_bytes(step * chunk.row_bytes).reshape(step, chunk.row_bytes)
    for row in range(0, chunk.num_rows, step):
        rows = block[: min(step, chunk.num_rows - row)]
        fill(file, chunk, chunk.offset + row * chunk.row_bytes, rows.reshape(-1))
        by_row[row : row + step] = rows[:, chunk.first : chunk.end]


def fill(file: int, chunk: Chunk, offset: int, target: Bytes) -> None:
    """Reads as often as it takes: one call gives at most 2 GiB, and less where a signal comes."""
    view, done = target.data, 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            raise CheckpointError(
                f"{chunk.entry.file} is truncated: it ends within {chunk.entry.name}, at byte {offset + done}. "
                "Download it again."
            )
        done += count


def new_bytes(num_bytes: int) -> Bytes:
    """Memory that goes back to the system once it is let go, where malloc would keep it."""
    return np.frombuffer(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint8)
