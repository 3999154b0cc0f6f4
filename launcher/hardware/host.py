"""Memory and cores of this machine, as far as this process may use them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_OF_PROCESS = Path("/proc/self/cgroup")
STATUS_OF_PROCESS = Path("/proc/self/status")


def read_memory() -> tuple[int, int]:
    """(total, free) bytes of host memory, within the limits of the control groups (version 2) around this process.

    A batch system or a container may grant less than the machine has; going past that grant ends the process.
    """
    machine = psutil.virtual_memory()
    total, free = int(machine.total), int(machine.available)
    for folder in _cgroups():
        limit = _number(folder / "memory.max")
        if limit is not None:
            total, free = min(total, limit), min(free, max(limit - _held_bytes(folder), 0))
    return total, free


def num_cores() -> int:
    """Cores that this process may run on; at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_bytes() -> int | None:
    """The most host memory that was ever resident for this process, mapped files and shared pages included.

    None where the kernel does not tell. Not `ru_maxrss`, which begins with what the parent had.
    """
    try:
        rows = [line.split() for line in STATUS_OF_PROCESS.read_text().splitlines()]
    except OSError:
        return None
    return next((int(row[1]) * 1024 for row in rows if row and row[0] == "VmHWM:"), None)


def _cgroups() -> Iterator[Path]:
    """This process's control group and those around it, out to the root."""
    folder = CGROUP_ROOT / _own_cgroup()
    yield from (each for each in (folder, *folder.parents) if each.is_relative_to(CGROUP_ROOT))


def _own_cgroup() -> str:
    try:
        lines = CGROUP_OF_PROCESS.read_text().splitlines()
    except OSError:
        return ""
    return next((line.removeprefix("0::").lstrip("/") for line in lines if line.startswith("0::")), "")


def _held_bytes(folder: Path) -> int:
    # The kernel counts file cache as used, but gives it up before it refuses memory: a checkpoint that was read before
    # would otherwise look like memory taken.
    return (_number(folder / "memory.current") or 0) - _inactive_file_bytes(folder)


def _inactive_file_bytes(folder: Path) -> int:
    try:
        rows = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
    except OSError:
        return 0
    return next((int(row[1]) for row in rows if row[0] == "inactive_file"), 0)


def _number(path: Path) -> int | None:
    """The number in a control file; None where there is no such file or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
