"""The embedding in host memory, from where kernels of the card read it: a pass needs a row a token, not all of it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel.offload.host_memory import HostBuffer
from parallel.transports.shared_region import driver_call


@dataclass(frozen=True)
class HostEmbedding:
    """What an embedding reads since `move_embedding` had it; `buffer` must live as long as that."""

    buffer: HostBuffer

    @property
    def num_bytes(self) -> int:
        return self.buffer.memory.nbytes


def move_embedding(embedding: nn.Module, device: torch.device) -> HostEmbedding:
    """Takes the weight of an embedding off the device; the same rows are read through the link from then on.

    Raises:
        RuntimeError: the memory cannot be pinned.
        TransportError: the card cannot read it.
    """
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    buffer = HostBuffer(weight.nbytes, device)
    buffer.memory.copy_(weight.reshape(-1).view(torch.uint8))
    seen = card_view(buffer, device) if device.type == "cuda" else buffer.memory
    embedding.weight = nn.Parameter(seen.view(weight.dtype).view(weight.shape), requires_grad=False)
    return HostEmbedding(buffer)


def card_view(buffer: HostBuffer, device: torch.device) -> Tensor:
    """[bytes] uint8: pinned memory as a tensor of the card."""
    address = ctypes.c_uint64()
    host = ctypes.c_void_p(buffer.memory.data_ptr())
    driver_call("cuMemHostGetDevicePointer_v2", ctypes.byref(address), host, ctypes.c_uint(0))
    return torch.as_tensor(CardArray(buffer, address.value), device=device)


class CardArray:
    """Memory as CUDA's array interface describes it (numba, "CUDA Array Interface", version 2)."""

    def __init__(self, buffer: HostBuffer, address: int) -> None:
        self.buffer = buffer
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (buffer.memory.nbytes,), "typestr": "|u1", "data": (address, False), "version": 2
        }  # fmt: skip
