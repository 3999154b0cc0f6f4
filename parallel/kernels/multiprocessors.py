"""A card's multiprocessors, and how products of many rows are dealt to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache

import torch

# What a card keeps for itself of a block's shared memory.
RESERVED_SHARED_BYTES = 1024
# Where tiles cut into equal parts keep so many of the blocks busy that fit, no block works on two of them.
ALIGNED_SHARE = 0.9


@dataclass(frozen=True)
class Card:
    """Multiprocessors, and the shared memory of each."""

    multiprocessors: int
    shared_bytes: int


@cache
def describe_card(device_index: int) -> Card:
    card = torch.cuda.get_device_properties(device_index)
    return Card(card.multi_processor_count, card.shared_memory_per_multiprocessor)


# How many multiprocessors products leave to what goes on beside them.
SPARED: ContextVar[int] = ContextVar("SPARED", default=0)


@contextmanager
def sparing(multiprocessors: int) -> Iterator[None]:
    """Products that are started meanwhile leave so many multiprocessors free.

    Their blocks fill a multiprocessor, and get shares of one size: those that wait for a place take twice the time.
    """
    token = SPARED.set(multiprocessors)
    try:
        yield
    finally:
        SPARED.reset(token)


def spared_card(device_index: int) -> Card:
    """What is left of a card."""
    card = describe_card(device_index)
    return replace(card, multiprocessors=max(1, card.multiprocessors - SPARED.get()))


def count_sharing(places: int, units: int, most: int) -> int:
    """Of `most` blocks those that share tiles of `units` each: an equal number a tile, where that leaves few idle."""
    most = min(most, places * units)
    aligned = places * min(most // places, units)
    return aligned if aligned >= ALIGNED_SHARE * most else most
