"""Rows of activations from the card to the host and back, for products that the host computes between kernels.

Kernels read and write the pinned memory themselves: a copy would wait in the copy engine behind the weights of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from parallel.offload.embedding import card_view
from parallel.offload.host_memory import HostBuffer

# More is never sent: beyond it layers are streamed. 64 rows of the widest linear of a 70B, 57344 outputs.
MAX_BYTES = 8 * 1024**2


def multiply_on_host(rows: Tensor, num_out: int, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """[m, in] -> [m, num_out] of the same dtype and device; `multiply` gets the rows on the host."""
    if rows.device.type == "cpu":
        return multiply(rows)
    return exchange_with(rows.device).multiply(rows, num_out, multiply)


@cache
def exchange_with(device: torch.device) -> Exchange:
    return Exchange(device)


class Exchange:
    """Pinned memory for what goes down and what comes up, one product at a time."""

    def __init__(self, device: torch.device) -> None:
        # Made at its first use; tensors of inference mode could not be written to outside of it.
        with torch.inference_mode(mode=False):
            self.down, self.up = (HostBuffer(MAX_BYTES, device) for _ in range(2))
            self.down_seen, self.up_seen = (card_view(buffer, device) for buffer in (self.down, self.up))
        self.device, self.arrived = device, torch.cuda.Event()

    def multiply(self, rows: Tensor, num_out: int, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        # A product by one is a kernel, where a copy is the engine's; it changes no bit.
        torch.mul(rows, 1, out=part(self.down_seen, rows.shape, rows.dtype))
        self.arrived.record(torch.cuda.current_stream(self.device))
        # All that was queued is done then: what came up before has been read.
        self.arrived.synchronize()
        product = multiply(part(self.down.memory, rows.shape, rows.dtype))
        shape = torch.Size((len(rows), num_out))
        part(self.up.memory, shape, rows.dtype).copy_(product)
        return part(self.up_seen, shape, rows.dtype) * 1


def part(memory: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The first bytes of `memory` [bytes] uint8, as a tensor."""
    return memory[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
