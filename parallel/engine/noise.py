"""Random numbers by counting: a function of a key, a step and an index, the same on every device and in every graph."""

from __future__ import annotations

import torch
from torch import Tensor


def signed(word: int) -> int:
    """64 bits as torch's int64 holds them."""
    return (word + 2**63) % 2**64 - 2**63


# SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014): the increment of its counter,
# and the finaliser's shifts and factors.
INCREMENT = signed(0x9E3779B97F4A7C15)
ROUNDS = ((30, signed(0xBF58476D1CE4E5B9)), (27, signed(0x94D049BB133111EB)), (31, 1))
UPPER_BITS = 32
# Of uniform numbers. float32 rounds the largest 32 bits up to 2**32, of which this makes the largest number below 1.
STEP = (1 - 2.0**-24) * 2.0**-UPPER_BITS


def exponential_noise(keys: Tensor, steps: Tensor, width: int) -> Tensor:
    """[rows] int64 keys and steps -> [rows, width] float32, drawn from Exp(1); never 0, nor infinite: a
    certain token must win its race.

    Small values, which win races, are the finest resolved: -log(1 - u) with u in steps of 2**-32.
    """
    starts = mix(keys + mix(steps * INCREMENT))
    counters = torch.arange(width, device=keys.device, dtype=torch.int64) * INCREMENT
    bits = shift_right(mix(starts.unsqueeze(-1) + counters), 64 - UPPER_BITS)
    uniform = (bits.to(torch.float32) + 0.5) * STEP
    return -torch.log1p(-uniform)


def mix(words: Tensor) -> Tensor:
    """SplitMix64's finaliser: every bit of the result depends on every bit of a word."""
    for shift, factor in ROUNDS:
        words = (words ^ shift_right(words, shift)) * factor
    return words


def shift_right(words: Tensor, shift: int) -> Tensor:
    """Logical, where torch's own shift copies the sign."""
    return (words >> shift) & (2 ** (64 - shift) - 1)
