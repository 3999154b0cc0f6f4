"""The files that layers are read from in every pass: where they are, that they are the model's, and how fast they come.

Nothing is ever written to them or beside them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launcher.config import ConfigError, RunConfig
from parallel.checkpoint.headers import Checkpoint, TensorEntry, read_checkpoint
from parallel.formats.scheme import CheckpointError
from parallel.units import MIB

# The value of offload.disk that means the model's own files.
OWN_FILES = "checkpoint"
# Of each tensor that two copies must have in common to be taken for copies.
COMPARED_BYTES = 4096
# As layers are read (parallel/checkpoint/read_ahead.py): so many threads, so much at a time.
NUM_THREADS = 4
READ_BYTES = 4 * MIB
MOST_READ_BYTES = 512 * MIB
MOST_SEC = 1.0


def find_disk_folder(run: RunConfig, folder: Path) -> Path:
    """Where offload.disk says that layers are read from, of the model in `folder`.

    Raises:
        ConfigError: no such folder, or what is there is not the model's checkpoint.
    """
    value = run.offload.disk
    assert value is not None, "nobody asks without it"
    disk = folder if value == OWN_FILES else Path(value).expanduser()
    if not disk.is_dir() or not any(disk.glob("*.safetensors")):
        raise ConfigError(
            f"offload.disk={value}: no folder with *.safetensors. Layers are read from the checkpoint's own files, and "
            "nothing is written: offload.disk=checkpoint reads them where the model lies; a folder must hold a copy."
        )
    if disk.resolve() != folder.resolve():
        check_copy(run, read_checkpoint(folder), disk)
    return disk


def check_copy(run: RunConfig, original: Checkpoint, folder: Path) -> None:
    """Names, types, shapes, and the first bytes of each tensor; not all of them.

    Raises:
        ConfigError: they differ.
    """
    try:
        copy = read_checkpoint(folder)
    except CheckpointError as error:
        raise ConfigError(f"offload.disk={run.offload.disk}: {error}") from error
    for name, entry in original.tensors.items():
        twin = copy.tensors.get(name)
        if (
            twin is None
            or (twin.dtype, twin.shape) != (entry.dtype, entry.shape)
            or first_bytes(twin) != first_bytes(entry)
        ):
            raise ConfigError(
                f"offload.disk={run.offload.disk} holds another checkpoint than {run.model.key}={run.model.path}: they "
                f"differ in {name}. Copy the model's *.safetensors with their index, or set offload.disk=checkpoint."
            )


def first_bytes(entry: TensorEntry) -> bytes:
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        return file.read(min(entry.num_bytes, COMPARED_BYTES))


def measure_disk(folder: Path) -> float | None:
    """GB/s of some of the largest file, from the disk and not the page cache as far as the system lets pages go; None
    where files are too small to tell."""
    file = max(folder.glob("*.safetensors"), key=lambda each: each.stat().st_size)
    size = min(file.stat().st_size, MOST_READ_BYTES)
    if size < NUM_THREADS * READ_BYTES:
        return None
    descriptor = os.open(file, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
        return timed_reads(descriptor, range(0, size, READ_BYTES))
    finally:
        os.close(descriptor)


def timed_reads(descriptor: int, offsets: Iterable[int]) -> float:
    start = time.perf_counter()

    def read(offset: int) -> int:
        return len(os.pread(descriptor, READ_BYTES, offset)) if time.perf_counter() - start < MOST_SEC else 0

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        num_bytes = sum(pool.map(read, offsets))
    return num_bytes / (time.perf_counter() - start) / 1e9
