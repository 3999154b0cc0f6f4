"""Weights brought into a card's L2 cache before the linear that reads them, while other kernels leave the memory idle.

Weights depend on nothing, so that their first bytes can be on their way during an all-reduce, a rotation or an
activation and the small kernels after it. Linears read a weight from its first byte on. The kernels that fetch take
such bytes, `Ahead`, and have blocks beside their own that ask for them (prefetch.cuh).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from parallel.kernels.launch import open_driver

# Up to two pieces of a weight: of its values and of their scales. None: nothing is fetched.
Ahead = Sequence[Tensor]
Arguments = tuple[Tensor | None, Tensor | None, int, int]
# As struct codes of the last parameters of a kernel that fetches.
PARAMETERS = "PPii"
# How long kernels leave the memory idle before the linear that they fetch for, in microseconds: in a step of one row,
# and for each row more. On two H200, all-reduces through host memory: all-reduce and norm 4.5 + 2.2 at one row,
# 12.9 + 2.3 at 8, 38 + 2.5 at 32; rotation and attention 1.9 + 3.5, of which some reads keys; activation 1.9.
IDLE_US = {"all_reduce": (6.0, 1.0), "rotation": (5.0, 0.0), "activation": (2.0, 0.0)}
# The most of the cache for what is fetched; it holds activations and keys, too. 0: nothing is fetched.
CACHE_SHARE = 1 / 3
# About one a multiprocessor.
FETCH_BLOCKS = 128
# Ways to fetch, as prefetch.cuh numbers them, and the one that is used.
WAYS = {"lines": 0, "sectors": 1, "bulk": 2, "paced": 3}
WAY = "lines"
# Of the driver's cuDeviceGetAttribute: kHz, kHz, bits, bytes.
CLOCK, MEMORY_CLOCK, BUS_WIDTH, CACHE_BYTES = 13, 36, 37, 38


def beginning(weight: Sequence[Tensor], num_bytes: int) -> Ahead:
    """The first `num_bytes` of a weight: of each of its tensors, one or two, the same share."""
    assert len(weight) <= 2, len(weight)
    total = sum(each.nbytes for each in weight)
    share = min(1.0, num_bytes / total) if total else 0.0
    pieces = (each.detach().view(-1)[: int(each.numel() * share)] for each in weight if each.is_contiguous())
    return tuple(piece for piece in pieces if piece.numel())


def idle_bytes(place: str, num_rows: int, device: torch.device) -> int:
    """What a card's memory delivers while the kernels from `place` (of IDLE_US) on run; none on a CPU."""
    if device.type != "cuda":
        return 0
    first_us, more_us = IDLE_US[place]
    delivered = (first_us + more_us * (num_rows - 1)) * bytes_per_ms(device.index) / 1e3
    return int(min(delivered, CACHE_SHARE * ask_card(CACHE_BYTES, device.index)))


def options(device_index: int, way: str | None = None) -> tuple[str, ...]:
    """How kernels that fetch are compiled for a card; `way`: of WAYS, WAY by default."""
    pace = max(1, bytes_per_ms(device_index) // max(1, ask_card(CLOCK, device_index)))
    return (f"-DFETCH={WAYS[way or WAY]}", f"-DBYTES_PER_CLOCK={pace}")


def bytes_per_ms(device_index: int) -> int:
    """What the memory of a card delivers at most: two transfers a clock."""
    return ask_card(MEMORY_CLOCK, device_index) * ask_card(BUS_WIDTH, device_index) // 8 * 2


@cache
def ask_card(attribute: int, device_index: int) -> int:
    found = ctypes.c_int()
    error = open_driver().cuDeviceGetAttribute(ctypes.byref(found), attribute, device_index)
    assert error == 0, f"the driver's error {error} for attribute {attribute}"
    return found.value


def beside(grid: tuple[int, int], *pieces: Tensor | None) -> tuple[tuple[int, int, int], Arguments]:
    """The grid of a kernel of `grid` blocks with those that fetch `pieces`, and its last arguments."""
    given = [piece for piece in pieces if piece is not None]
    layers = -(-FETCH_BLOCKS // (grid[0] * grid[1])) if given else 0
    first, second = (*given, None, None)[:2]
    return (*grid, 1 + layers), (first, second, bytes_of(first), bytes_of(second))


def bytes_of(piece: Tensor | None) -> int:
    return 0 if piece is None else piece.nbytes
