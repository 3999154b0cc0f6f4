"""Host memory that every rank of a machine maps, and its registration with a card.

The memory is anonymous (memfd) and never has a name in a file system: whatever kills the ranks, the kernel frees it
with the last of them, and the size of /dev/shm, 64 MB in many containers, does not limit it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from functools import cache
from typing import NoReturn

import torch

from parallel.communicator import Communicator, TransportError

# Page-aligned, page-locked for every context of the process, and seen by the card.
REGISTER_FLAGS = 0x01 | 0x02  # CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTREGISTER_DEVICEMAP
MESSAGE_BYTES = 256


class SharedRegion:
    """`num_bytes` of zeros that all processes with a descriptor of the same memfd see."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self.memory = mmap.mmap(descriptor, num_bytes)
        self.num_bytes = num_bytes
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.device_address = 0

    def touch(self, start: int, end: int) -> None:
        """Writes zeros, so that these pages lie in memory near the processor that this rank runs on."""
        self.memory[start:end] = bytes(end - start)

    def word(self, offset: int) -> ctypes.c_uint32:
        """The 4 bytes at `offset`, as they are at each look."""
        return ctypes.c_uint32.from_buffer(self.memory, offset)

    def register(self) -> None:
        """Locks the pages and maps them for the current card, which must have a context; sets `device_address`.

        Raises:
            TransportError: the driver refuses.
        """
        address = ctypes.c_uint64()
        driver_call("cuMemHostRegister_v2", ctypes.c_void_p(self.address), ctypes.c_size_t(self.num_bytes),
                    ctypes.c_uint(REGISTER_FLAGS))  # fmt: skip
        driver_call("cuMemHostGetDevicePointer_v2", ctypes.byref(address), ctypes.c_void_p(self.address),
                    ctypes.c_uint(0))  # fmt: skip
        self.device_address = address.value

    def unregister(self) -> None:
        driver_call("cuMemHostUnregister", ctypes.c_void_p(self.address))
        self.device_address = 0


def create_memory(num_bytes: int) -> int:
    """A descriptor of new anonymous memory; the caller closes it."""
    descriptor = os.memfd_create("launch70b", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, num_bytes)
    return descriptor


def share_region(communicator: Communicator, device: torch.device, num_bytes: int) -> SharedRegion:
    """One region for all ranks of `communicator`, which must be processes of one machine. Rank 0 creates it.

    Raises:
        TransportError: on every rank, if one of them cannot create or map it; the message names the rank and why.
    """
    descriptor, problem = -1, ""
    if communicator.rank == 0:
        try:
            descriptor = create_memory(num_bytes)
        except OSError as error:
            problem = f"cannot create {num_bytes} bytes of shared memory: {error}"
    try:
        raise_everywhere(communicator, device, problem)
        pid, number = communicator.all_gather(torch.tensor([os.getpid(), descriptor], device=device))[0].tolist()
        region, problem = open_region(pid, number, num_bytes)
        # Also the moment from which rank 0 may close its descriptor: all others have theirs.
        raise_everywhere(communicator, device, problem)
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    assert region is not None, problem
    return region


def open_region(pid: int, descriptor: int, num_bytes: int) -> tuple[SharedRegion | None, str]:
    """Maps memory that process `pid` holds as `descriptor`; the region, or why not."""
    try:
        ours = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return None, f"cannot open rank 0's memory ({error}): ranks must share a machine, a user and a pid namespace"
    try:
        return SharedRegion(ours, num_bytes), ""
    except (OSError, ValueError) as error:
        return None, f"cannot map {num_bytes} bytes of shared memory: {error}"
    finally:
        os.close(ours)


def raise_everywhere(communicator: Communicator, device: torch.device, problem: str) -> None:
    """Every rank calls this with its problem, or "".

    Raises:
        TransportError: on all ranks, if any has a problem: that of the first one that has.
    """
    for rank, text in enumerate(gather_texts(communicator, device, problem)):
        if text:
            raise TransportError(f"rank {rank} {text}.")


def gather_texts(communicator: Communicator, device: torch.device, text: str) -> list[str]:
    """One short text of each rank, in rank order; longer ones are cut."""
    padded = text.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    rows = communicator.all_gather(torch.tensor(list(padded), dtype=torch.uint8, device=device))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows.tolist()]


@cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def driver_call(name: str, *args: object) -> None:
    """Calls a function of CUDA's driver.

    Raises:
        TransportError: it returned an error, or there is no driver.
    """
    code = driver_function(name)(*args)
    if code != 0:
        raise_for(name, code)


def driver_function(name: str) -> Callable[..., int]:
    """A function of CUDA's driver; addresses, handles and sizes go to it as types of C, or would lose their upper half.

    Raises:
        TransportError: there is no driver, or it is too old to have this.
    """
    try:
        function: Callable[..., int] = driver()[name]
    except (OSError, AttributeError) as error:
        raise TransportError(f"cannot load CUDA's driver: {error}.") from None
    return function


def raise_for(name: str, code: int) -> NoReturn:
    """Raises TransportError: the driver's function returned an error."""
    text = ctypes.c_char_p()
    driver().cuGetErrorName(code, ctypes.byref(text))
    raise TransportError(f"{name} failed with {(text.value or b'').decode() or code}.")
