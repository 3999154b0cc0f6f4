"""How fast a file can be read: methods, threads and sizes of a read, from the disk (cold) and the page cache (warm).

Usage: python -m tools.bench.read FILE --threads 1 2 4 8 --chunk-mib 4 16

The file is dropped from the page cache before each cold read. Rates are the best of several. The last line of stdout is
the table as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

MIB = 2**20
REPEATS = 5

Rates = tuple[float, float | None]
Read = Callable[[Path, int, mmap.mmap], None]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.read", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--chunk-mib", type=int, nargs="+", default=[4, 16], metavar="N")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    args = parser.parse_args(argv)
    settings = list(itertools.product(args.chunk_mib, args.threads, args.methods))
    # Round after round, so that what else the machine does hits all alike.
    rounds = [[measure(args.file, *setting) for setting in settings] for _ in range(REPEATS)]
    rows = [
        {"method": method, "threads": num_threads, "chunk_mib": chunk_mib, **best(rates)}
        for (chunk_mib, num_threads, method), rates in zip(settings, zip(*rounds, strict=True), strict=True)
    ]
    print("\n".join(table_lines(rows)))
    print(json.dumps({"file_bytes": args.file.stat().st_size, "repeats": REPEATS, "reads": rows}))


def measure(file: Path, chunk_mib: int, num_threads: int, method: str) -> Rates:
    """GB/s after the file has left the page cache, and once it is there again."""
    drop_cache(file)
    cold = read_file(file, METHODS[method], num_threads, chunk_mib * MIB)
    # O_DIRECT goes past the cache, and leaves nothing there for the next run.
    warm = None if method == "direct" else read_file(file, METHODS[method], num_threads, chunk_mib * MIB)
    return cold, warm


def best(rates: Sequence[Rates]) -> dict[str, float | None]:
    cold, warm = zip(*rates, strict=True)
    return {"cold_gb_per_sec": max(cold), "warm_gb_per_sec": None if None in warm else max(warm)}


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
