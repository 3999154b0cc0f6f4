"""All-reduce in one hop through memory of the cards themselves, where each reads the others': torch's own kernel.

A rank copies its message into a buffer that all cards have mapped; the kernel waits for the peers' copies, adds them up
in rank order and ends only when all have read, so that one buffer is enough. It waits without a limit, as NCCL's do in
a graph: whoever started the ranks ends them when one dies. Calls must follow one another on the card, as on one stream;
two at a time would take each other's signals.

The op of torch that makes the copy, too, is not used: between copy and signal its warps do not wait for one another
(torch 2.11 to 2.13).
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.communicator import Around, Communicator
from parallel.transports.channel import first_line, reduce_aligned
from parallel.transports.region_layout import UNIT_BYTES
from parallel.transports.shared_region import driver_function, raise_everywhere
from parallel.units import KIB

# With torch's signals beside it, 4 MiB of each card.
MAX_BYTES = 2048 * KIB
# That torch's kernel adds up.
DTYPES = (torch.bfloat16, torch.float32)
# CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED of cuda.h.
NATIVE_ATOMICS = 3


class PeerMemory(Around):
    """All-reduces of whole units of up to `MAX_BYTES` through the cards' memory, everything else through `inner`.

    Args:
        buffer: MAX_BYTES of this card, as uint8, which the others have mapped.
        group: the name of the process group whose ranks have.
    """

    name = "peer_memory"

    def __init__(self, inner: Communicator, buffer: Tensor, group: str) -> None:
        super().__init__(inner)
        self.buffer: Tensor | None = buffer
        self.group = group

    def all_reduce(self, tensor: Tensor) -> Tensor:
        # By what all ranks know: the length and the type, not where the tensor lies.
        whole = tensor.nbytes % UNIT_BYTES == 0 and 0 < tensor.nbytes <= MAX_BYTES
        if tensor.dtype not in DTYPES or not whole:
            return self.inner.all_reduce(tensor)
        return reduce_aligned(self.reduce, tensor, UNIT_BYTES)

    def reduce(self, source: Tensor, target: Tensor) -> None:
        """Sum over the ranks of `source`, into `target`, which may be the same."""
        assert self.buffer is not None
        message = self.buffer[: source.nbytes].view(source.dtype)
        message.copy_(source.view(-1))
        torch.ops.symm_mem.one_shot_all_reduce_out(message, "sum", self.group, target.view(-1))

    def close(self) -> None:
        """Gives the memory back; nothing may be reduced after it."""
        if self.buffer is not None and self.buffer.is_cuda:
            torch.cuda.synchronize(self.buffer.device)
        # Its last reference: torch then unmaps the peers' buffers, too.
        self.buffer = None


def reach_each_other(cards: Sequence[int]) -> bool:
    """Whether each of these cards, CUDA's indices, can use the others' memory, and may.

    Over PCIe they cannot: torch's signals are atomics in a peer's memory. NCCL_P2P_DISABLE, which
    limits.peer_access=off sets, is heeded: who has set it may know that the links are broken.
    """
    if os.environ.get("NCCL_P2P_DISABLE", "0") != "0" or not torch.cuda.is_available():
        return False
    pairs = permutations(cards, 2)
    return all(torch.cuda.can_device_access_peer(card, peer) and has_atomics(card, peer) for card, peer in pairs)


def has_atomics(card: int, peer: int) -> bool:
    found = ctypes.c_int()
    code = driver_function("cuDeviceGetP2PAttribute")(ctypes.byref(found), NATIVE_ATOMICS, card, peer)
    return code == 0 and bool(found.value)


def wrap_peer_memory(inner: Communicator, device: torch.device) -> PeerMemory:
    """A buffer of each rank's card, mapped by the others'. `inner` has the ranks of the default process group.

    Raises:
        TransportError: on every rank, if one of them has no such memory.
        RuntimeError: a rank cannot map a peer's.
    """
    # It has no use here, and rendezvous would take what the switch between the cards has of it.
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    buffer, problem = None, ""
    try:
        buffer = empty_buffer(device)
    except Exception as error:  # This torch has none, or the driver refuses it.
        problem = first_line(error)
    raise_everywhere(inner, device, problem)
    assert buffer is not None and dist.group.WORLD is not None
    group = dist.group.WORLD.group_name
    symmetric_memory().rendezvous(buffer, group)
    return PeerMemory(inner, buffer, group)


def empty_buffer(device: torch.device) -> Tensor:
    # What its `empty` calls within a pool of torch's allocator, which keeps no such memory.
    buffer: Tensor = symmetric_memory()._SymmetricMemory.empty_strided_p2p((MAX_BYTES,), (1,), torch.uint8, device)
    return buffer


def symmetric_memory() -> Any:
    """Torch's module, which takes its time to import, and is not in every build."""
    return importlib.import_module("torch.distributed._symmetric_memory")
