"""What the layouts of all regions of host memory have in common; without torch, for plans."""

from __future__ import annotations

from typing import Protocol

# host_memory_common.cuh has the same numbers.
PAGE_BYTES = 4096
ERROR_STRIDE = 64
# What a kernel reads or writes at a time, of messages that are aligned to it.
UNIT_BYTES = 16
MAX_RANKS = 4


class RegionLayout(Protocol):
    """Where things lie in a region; all in bytes."""

    @property
    def world_size(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    def own(self, rank: int) -> tuple[int, int]:
        """Start and end of what `rank` writes."""
        ...
