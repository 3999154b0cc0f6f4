"""Who holds which card: compute processes as NVML lists them, and lock files between queues of one machine."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from launcher.config import HardwareConfig
from launcher.hardware import nvml
from launcher.hardware.inventory import Card, read_inventory
from parallel.units import GIB

LOCK_FOLDER = Path(tempfile.gettempdir()) / "launch70b-cards"


@dataclass(frozen=True)
class CardState:
    """A card that CUDA shows this process, and in words who computes on it; empty where nobody does."""

    card: Card
    holders: tuple[str, ...]


def read_cards() -> tuple[CardState, ...]:
    """Cards of this machine, less those that CUDA_VISIBLE_DEVICES hides; empty without NVML.

    Only compute counts: a desktop draws on its card all the time and leaves room for others.
    """
    cards = read_inventory(HardwareConfig(), 0).cards
    with nvml.session() as answers:
        return tuple(CardState(card, read_holders(card)) for card in cards) if answers else ()


def read_holders(card: Card) -> tuple[str, ...]:
    handle = nvml.ask("nvmlDeviceGetHandleByIndex", card.nvml_index)
    processes = nvml.ask("nvmlDeviceGetComputeRunningProcesses", handle) or []
    return tuple(describe_process(process) for process in processes)


def describe_process(process: Any) -> str:
    """The process of an NVML entry: its number, program, user and memory, as far as they are to be known."""
    # Another container's processes have numbers that mean nothing here.
    words = f"process {process.pid}"
    try:
        found = psutil.Process(process.pid)
        words += f" ({found.name()}) of {found.username()}"
    except (psutil.Error, KeyError):
        words += " (not visible from here)"
    return words + (f", {process.usedGpuMemory / GIB:.2f} GiB" if process.usedGpuMemory else "")


class CardLock:
    """One card, kept from other queues as long as this process, or one that inherited `fd`, has the file open."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def release(self) -> None:
        os.close(self.fd)


def lock_card(uuid: str, folder: Path = LOCK_FOLDER) -> CardLock | str:
    """The card's lock, or in words who has it.

    Raises:
        OSError: the folder cannot be used.
    """
    make_shared_folder(folder)
    fd = open_shared(folder / f"{uuid}.lock")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(fd, 100, 0).decode(errors="replace").strip()
        os.close(fd)
        return f"a queue, process {owner}" if owner else "a queue"
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()} of {psutil.Process().username()}".encode(), 0)
    return CardLock(fd)


def make_shared_folder(folder: Path) -> None:
    """A folder in which every user of the machine may make files, as in /tmp."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o1777)


def open_shared(path: Path) -> int:
    """A file that every user may lock. Linux refuses O_CREAT on another user's file in such folders, so that one that
    is there is opened without."""
    try:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        pass
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        # Another queue was faster.
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    os.fchmod(fd, 0o666)
    return fd


def take_cards(
    num_cards: int, states: Sequence[CardState], ours: Sequence[str], folder: Path = LOCK_FOLDER
) -> tuple[list[tuple[Card, CardLock]], list[str]]:
    """The first free cards, locked, or none; and a line for each card that others hold.

    Args:
        ours: UUIDs of cards that jobs of this queue have; they are neither free nor another's.
    """
    taken: list[tuple[Card, CardLock]] = []
    held: list[str] = []
    for state in states:
        if state.card.uuid in ours or len(taken) == num_cards:
            continue
        lock = "" if state.holders else lock_card(state.card.uuid, folder)
        if isinstance(lock, CardLock):
            taken.append((state.card, lock))
        else:
            held.append(f"card {state.card.index} ({state.card.name}): {lock or '; '.join(state.holders)}")
    if len(taken) == num_cards:
        return taken, held
    for _, lock in taken:
        lock.release()
    return [], held
