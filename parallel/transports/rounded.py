"""All-reduces of numbers that each rank rounds to 8 bits first, in plain torch: what host_memory_int8.cu computes.

Ranks on the CPU talk this way where 8 bits are asked for, so that what it costs in accuracy shows there too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.communicator import Around, Communicator
from parallel.transports.selftest import Timing, agreed_number, time_calls, timing_of

# As in host_memory_int8.cu: numbers that share a scale, and the largest code.
GROUP = 12
LARGEST = 127
# Of scales; the kernel divides by none below it.
SMALLEST = torch.finfo(torch.float32).tiny
# Of a lane, in a tile: three units of 16 bytes are two groups.
LANES, UNIT_NUMBERS, UNITS = 32, 8, 3
REPEATS = 20


def round_to_int8(values: Tensor) -> Tensor:
    """`values` [...] of any length as their groups carry them: float32, each a multiple of its group's scale.

    Symmetric, by the largest size of a group over 127, in bfloat16. Infinity or NaN makes a group NaN, a scale below
    2**-126 zero.
    """
    grouped = group(values.detach().float().flatten())
    scale = (grouped.abs().amax(dim=-1, keepdim=True) / LARGEST).bfloat16().float()
    inverse = torch.where(scale < SMALLEST, 0, 1 / scale)
    codes = (grouped * inverse).round().nan_to_num(0).clamp(-LARGEST, LARGEST)
    return ungroup(codes * scale, values.numel()).reshape(values.shape)


def group(flat: Tensor) -> Tensor:
    """[numbers] -> [tiles, lanes, groups, 12], padded with zeros: a lane's units lie a warp apart."""
    tile = LANES * UNITS * UNIT_NUMBERS
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % tile))
    return (
        padded.view(-1, UNITS, LANES, UNIT_NUMBERS)
        .transpose(1, 2)
        .reshape(-1, LANES, UNITS * UNIT_NUMBERS // GROUP, GROUP)
    )


def ungroup(grouped: Tensor, count: int) -> Tensor:
    """What `group` undoes, less its padding."""
    return grouped.reshape(-1, LANES, UNITS, UNIT_NUMBERS).transpose(1, 2).flatten()[:count]


class Rounded(Around):
    """All-reduces of `inner` over numbers rounded to 8 bits; integers and gathers as they are."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.name = f"{inner.name}_int8"

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return self.inner.all_reduce(tensor)
        return tensor.copy_(self.inner.all_reduce(round_to_int8(tensor)))


def find_wrong_rounded_sums(communicator: Communicator, device: torch.device) -> str:
    """Which message came out wrong, if any. Goes through all of them, so that ranks stay in step."""
    sizes = (16, 1008, 16 * 1024, 100_000, 512 * 1024)
    wrong = [size for size in sizes if not sums_as_rounded(communicator, device, size)]
    return f"gave wrong sums of {wrong[0]} bytes" if wrong else ""


def sums_as_rounded(communicator: Communicator, device: torch.device, num_bytes: int) -> bool:
    """Whether a sum of fresh bfloat16 values is that of the rounded ones but for its own rounding, on every rank."""
    seed = agreed_number(communicator, device, 0, 2**20)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(communicator.world_size, num_bytes // 2, generator=generator).bfloat16().to(device)
    found = communicator.all_reduce(values[communicator.rank].clone())
    expected = torch.stack([round_to_int8(each) for each in values]).sum(dim=0)
    return torch.allclose(found.float(), expected, rtol=2**-7, atol=1e-6)


def time_rounded(communicator: Communicator, device: torch.device, num_bytes: int, *, repeats: int = REPEATS) -> Timing:
    """As time_all_reduce of bfloat16, which is what is rounded."""
    message = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=device)
    times = time_calls(communicator, lambda: communicator.all_reduce(message), device, captured=True, repeats=repeats)
    return timing_of(num_bytes, times, exact=sums_as_rounded(communicator, device, num_bytes))
