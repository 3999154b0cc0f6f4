"""How fast a file can be read: methods, threads and sizes of a read, from the disk (cold) and the page cache (warm).

Usage: python -m tools.bench_read FILE --threads 1 2 4 8 --chunk-mib 4 16

The file is dropped from the page cache before each cold read. The last line of stdout is the table as JSON.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

MIB = 2**20
REPEATS = 3

Read = Callable[[Path, int, mmap.mmap], None]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--chunk-mib", type=int, nargs="+", default=[4, 16], metavar="N")
    args = parser.parse_args(argv)
    rows = [
        bench(args.file, method, num_threads, chunk_mib)
        for chunk_mib in args.chunk_mib
        for num_threads in args.threads
        for method in METHODS
    ]
    print("\n".join(table_lines(rows)))
    print(json.dumps({"file_bytes": args.file.stat().st_size, "reads": rows}))


def bench(file: Path, method: str, num_threads: int, chunk_mib: int) -> dict[str, Any]:
    """Medians in GB/s of REPEATS reads, each after the file has left the page cache, and with it there."""
    cold, warm = [], []
    for _ in range(REPEATS):
        drop_cache(file)
        cold.append(read_file(file, METHODS[method], num_threads, chunk_mib * MIB))
    # O_DIRECT goes past the cache, and leaves nothing there for the next run.
    if method != "direct":
        warm = [read_file(file, METHODS[method], num_threads, chunk_mib * MIB) for _ in range(REPEATS)]
    return {
        "method": method,
        "threads": num_threads,
        "chunk_mib": chunk_mib,
        "cold_gb_per_sec": statistics.median(cold),
        "warm_gb_per_sec": statistics.median(warm) if warm else None,
    }


def read_file(file: Path, read: Read, num_threads: int, chunk_bytes: int) -> float:
    """GB/s. The file is read up to a multiple of `chunk_bytes`, into buffers that are there already."""
    end = file.stat().st_size // chunk_bytes * chunk_bytes
    buffers: SimpleQueue[mmap.mmap] = SimpleQueue()
    for _ in range(num_threads):
        # Aligned to pages, which O_DIRECT asks for.
        buffers.put(mmap.mmap(-1, chunk_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))

    def read_at(offset: int) -> None:
        buffer = buffers.get()
        read(file, offset, buffer)
        buffers.put(buffer)

    start = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(read_at, range(0, end, chunk_bytes)))
    return end / (time.perf_counter() - start) / 1e9


def read_mapped(file: Path, offset: int, buffer: mmap.mmap) -> None:
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), len(buffer), offset=offset, prot=mmap.PROT_READ) as view:
        buffer[:] = view


def read_buffered(file: Path, offset: int, buffer: mmap.mmap, *, flags: int = 0, advice: int | None = None) -> None:
    descriptor = os.open(file, os.O_RDONLY | flags)
    try:
        if advice is not None:
            os.posix_fadvise(descriptor, offset, len(buffer), advice)
        target, done = memoryview(buffer), 0
        while done < len(target):
            done += os.preadv(descriptor, [target[done:]], offset + done)
    finally:
        os.close(descriptor)


def read_sequential(file: Path, offset: int, buffer: mmap.mmap) -> None:
    read_buffered(file, offset, buffer, advice=os.POSIX_FADV_SEQUENTIAL)


def read_announced(file: Path, offset: int, buffer: mmap.mmap) -> None:
    read_buffered(file, offset, buffer, advice=os.POSIX_FADV_WILLNEED)


def read_direct(file: Path, offset: int, buffer: mmap.mmap) -> None:
    read_buffered(file, offset, buffer, flags=os.O_DIRECT)


METHODS: dict[str, Read] = {
    "mmap": read_mapped,
    "pread": read_buffered,
    "pread, SEQUENTIAL": read_sequential,
    "pread, WILLNEED": read_announced,
    "direct": read_direct,
}


def drop_cache(file: Path) -> None:
    """Pages that are not yet on the disk, or mapped by a process, stay."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def table_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "method             threads  MiB  cold GB/s  warm GB/s"
    for row in rows:
        warm = "-" if row["warm_gb_per_sec"] is None else f"{row['warm_gb_per_sec']:.2f}"
        yield (
            f"{row['method']:17}  {row['threads']:7}  {row['chunk_mib']:3}  {row['cold_gb_per_sec']:9.2f}  {warm:>9}"
        )


if __name__ == "__main__":
    main()
