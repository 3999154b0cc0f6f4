"""Ranks on the CPU that talk through memory they share: each sum over gloo takes 0.6 to 1.8 ms of every rank's core."""

from __future__ import annotations

import ctypes
from errno import EINTR

import torch
from torch import Tensor

from parallel.communicator import Communicator, SeparateNorm
from parallel.transports.shared_region import share_region

# Of one rank's values in one collective; pages that are never written take no memory.
SLOT_BYTES = 2**26
# Room for a semaphore of libc's.
SEMAPHORE_BYTES = 64


class SharedMemory(SeparateNorm):
    """Every rank writes into a slot of its own and wakes the others; then all read all slots.

    Slots are of two halves in turn. Who fills a half again has heard from all in the collective between, in which they
    had read what was there.
    """

    name = "shared memory"
    capturable = False

    def __init__(self, inner: Communicator) -> None:
        """Of the ranks of `inner`, over which they find the memory."""
        self.rank, self.world_size, self.half = inner.rank, inner.world_size, 0
        num_slots, head = 2 * self.world_size, SEMAPHORE_BYTES * self.world_size**2
        self.region = share_region(inner, torch.device("cpu"), head + num_slots * SLOT_BYTES)
        values = torch.frombuffer(self.region.memory, dtype=torch.uint8, offset=head)
        self.slots = values.view(2, self.world_size, SLOT_BYTES)
        self.libc = ctypes.CDLL(None, use_errno=True)
        for other in self.others():
            self.libc.sem_init(self.semaphore(other, self.rank), 1, 0)
        inner.barrier()

    def others(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank != self.rank]

    def semaphore(self, sender: int, receiver: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.region.address + SEMAPHORE_BYTES * (sender * self.world_size + receiver))

    def exchange(self, tensor: Tensor) -> list[Tensor]:
        """Each rank's `tensor`, in rank order, as it stays until the next collective but one."""
        assert tensor.nbytes <= SLOT_BYTES
        self.half = 1 - self.half
        slots = [slot[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for slot in self.slots[self.half]]
        slots[self.rank].copy_(tensor)
        for other in self.others():
            self.libc.sem_post(self.semaphore(self.rank, other))
        for other in self.others():
            while self.libc.sem_wait(self.semaphore(other, self.rank)):
                assert ctypes.get_errno() == EINTR
        return slots

    def all_reduce(self, tensor: Tensor) -> Tensor:
        first, *others = self.exchange(tensor)
        total = first.clone()
        for other in others:
            total += other
        return tensor.copy_(total)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.exchange(tensor))

    def barrier(self) -> None:
        self.exchange(torch.empty(0))

    def check(self) -> None:
        """Nothing is given up: who starts ranks ends those that hang."""
