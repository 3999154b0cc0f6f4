"""Host memory for streamed layers: exactly as much as they take, pinned once where the device is a card.

torch's own pinned memory comes in powers of two, up to twice of what is asked for.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

# For all contexts of the process, and readable by kernels of the card.
REGISTER_FLAGS = 0x01 | 0x02  # cudaHostRegisterPortable, cudaHostRegisterMapped
# Buffers made ready while layers load: to find, clear and lock 454 MB of pages took 57 ms on one core, in huge pages 25
# to 37 (two vCPUs of a cloud server).
NUM_AHEAD = 2
FEWER_LAYERS = "stream fewer layers (offload.resident_layers)"


class HostBuffer:
    """`memory`: [num_bytes] uint8, whose pages stay where they are for as long as the buffer lives.

    Args:
        less: how to need less, for the error where the driver refuses.
    """

    def __init__(self, num_bytes: int, device: torch.device, less: str = FEWER_LAYERS) -> None:
        self.memory = map_pages(num_bytes)
        if device.type == "cuda":
            register(self.memory, device, less)
            # Not at the end of the process, which frees all at once.
            weakref.finalize(self, unregister, self.memory, device).atexit = False


def map_pages(num_bytes: int) -> Tensor:
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel may be without them.
    with suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(pages, dtype=np.uint8))


def register(memory: Tensor, device: torch.device, less: str) -> None:
    """Locks the pages, for any thread.

    Raises:
        RuntimeError: the driver refuses.
    """
    torch.cuda.set_device(device)
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, REGISTER_FLAGS)
    if int(error) != 0:
        raise RuntimeError(
            f"cannot pin {memory.nbytes} bytes of host memory ({error}). Free some of it, raise the limit of locked "
            f"memory (ulimit -l), or {less}."
        )


def unregister(memory: Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


class HostMemory:
    """Gives out `num_buffers` buffers, mostly of one size, of which some are made ready ahead of their use."""

    def __init__(self, num_buffers: int, device: torch.device) -> None:
        self.device, self.num_left = device, num_buffers
        self.num_ready_bytes = 0
        self.ready: deque[Future[HostBuffer]] = deque()
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="pin")

    def take(self, num_bytes: int) -> HostBuffer:
        """One of at least `num_bytes`. Raises RuntimeError as `register`."""
        self.num_left -= 1
        if self.ready and self.num_ready_bytes == num_bytes:
            buffer = self.ready.popleft().result()
        else:
            self.ready.clear()
            buffer = HostBuffer(num_bytes, self.device)
        self.num_ready_bytes = num_bytes
        while len(self.ready) < min(NUM_AHEAD, self.num_left):
            self.ready.append(self.pool.submit(HostBuffer, num_bytes, self.device))
        if self.num_left == 0:
            self.pool.shutdown(wait=False)
        return buffer
