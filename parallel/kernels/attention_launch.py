"""How paged_attention.cu is compiled and started for given heads, rows and contexts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from parallel.kernels.limits import MAX_NODES, PAGE_SIZE
from parallel.kernels.node_bits import num_words
from parallel.kernels.pages import FP8

PARAMETERS = "PPPPPPPPPPfiiiiiii"
TILE = 16
MAX_SPLITS = 64
# Blocks that add up their splits in shared memory: what every card of sm_90 or later takes.
MAX_CLUSTER = 8
# Shared memory of a multiprocessor that holds the rings and what others of the cluster store: not that of an RTX 5090.
CLUSTER_ROOM_BYTES = 128 * 1024
# Sequences times KV heads times passes of one launch.
MAX_COUNTERS = 16384
# Of 8 query heads: what registers hold of sums and products.
MAX_COLUMN_TILES = 4
# One block on a multiprocessor of an RTX 4090 (100 KiB), two on that of an H200.
RING_BYTES = 96 * 1024
# More is not worth the instructions that start it.
MAX_DEPTH = 8
# Blocks worth starting for each multiprocessor: the rings of one hold what keeps memory busy (80 KiB under way on each;
# the 4.2 TB/s of an H200 need 26 in 0.8 us), and the fewer splits, the fewer sums to add up.
BLOCKS_PER_MULTIPROCESSOR = 1


@dataclass(frozen=True)
class Launch:
    """How the kernel is compiled."""

    head_dim: int
    # Of 8 query heads of a KV head, those of all rows of a sequence beside one another.
    column_tiles: int
    tree: bool
    query_f16: bool
    kv_fp8: bool
    warps: int
    # Units of 16 tokens' keys, or values, in a warp's ring.
    depth: int
    # Splits that are added up in shared memory: a power of two; above 1 only from sm_90 on.
    cluster: int = 1

    @property
    def unit_bytes(self) -> int:
        return unit_bytes(self.head_dim, kv_fp8=self.kv_fp8)

    @property
    def blocks(self) -> int:
        """That a multiprocessor has registers for: eight warps of two tiles need more than half of them."""
        return 2 if self.warps * self.column_tiles <= 8 else 1

    def shared_bytes(self) -> int:
        """Shared memory of a block: the rings of its warps and the query, later the sums of the warps."""
        columns = self.column_tiles * 8
        query = columns * self.head_dim * 2 if self.column_tiles > 2 else 0
        return max(self.warps * self.depth * self.unit_bytes + query, self.warps * columns * self.head_dim * 4)

    def options(self) -> tuple[str, ...]:
        values = {
            "HEAD_DIM": self.head_dim,
            "PAGE_SIZE": PAGE_SIZE,
            "NT": self.column_tiles,
            "WARPS": self.warps,
            "DEPTH": self.depth,
            "BLOCKS": self.blocks,
            "MAX_SPLITS": MAX_SPLITS,
            "MAX_COUNTERS": MAX_COUNTERS,
            "MAX_WORDS": num_words(MAX_NODES),
            "TREE": int(self.tree),
            "QUERY_F16": int(self.query_f16),
            "KV_FP8": int(self.kv_fp8),
            "CLUSTER": self.cluster,
            "MAX_GROUPS": MAX_SPLITS // MAX_CLUSTER,
        }
        return tuple(f"-D{name}={value}" for name, value in values.items())


def unit_bytes(head_dim: int, *, kv_fp8: bool) -> int:
    return TILE * head_dim * (1 if kv_fp8 else 2)


def num_passes(columns: int) -> int:
    """How many times blocks read a context whose rows have `columns` query heads of a KV head together."""
    return -(-columns // (8 * MAX_COLUMN_TILES))


@cache
def choose_launch(
    head_dim: int, columns: int, dtype: torch.dtype, kv_dtype: torch.dtype, *, tree: bool = False, warps: int = 0
) -> Launch:
    """For `columns` query heads of a KV head, of all rows of a sequence together. `warps`: 4 or 8; 0 chooses.

    A unit of fp8 has half the bytes and as many instructions, so that it takes more warps to keep memory busy; with
    more than a tile of columns, a warp's registers are needed elsewhere.
    """
    kv_fp8 = kv_dtype == FP8
    tiles = -(-columns // (8 * num_passes(columns)))
    warps = warps or (8 if kv_fp8 and tiles == 1 else 4)
    query_bytes = tiles * 8 * head_dim * 2 if tiles > 2 else 0
    depth = (RING_BYTES - query_bytes) // warps // unit_bytes(head_dim, kv_fp8=kv_fp8)
    return Launch(head_dim, tiles, tree, dtype == torch.float16, kv_fp8, warps, min(MAX_DEPTH, depth))


def choose_splits(pairs: int, max_tokens: int, multiprocessors: int, warps: int) -> int:
    """Into how many blocks each of `pairs` is split, for contexts of up to `max_tokens`.

    Pairs are sequences times KV heads times passes. Never from the lengths, which a graph finds on the card when it is
    replayed: shorter sequences leave splits idle.
    """
    wanted = BLOCKS_PER_MULTIPROCESSOR * multiprocessors // max(1, pairs)
    return max(1, min(wanted, -(-max_tokens // (TILE * warps)), MAX_SPLITS))


def choose_splits_in_clusters(pairs: int, max_tokens: int, multiprocessors: int, launch: Launch) -> int:
    """As choose_splits; two in place of one where a multiprocessor has room for both halves of each.

    Blocks that come while those of the kernel ahead are there may pair up: of halves, two are no more than one block on
    each, and sequences that are longer than others hold all up for half as long.
    """
    splits = choose_splits(pairs, max_tokens, multiprocessors, launch.warps)
    fits = pairs <= multiprocessors and launch.blocks == 2
    return choose_splits(pairs, max_tokens, 2 * pairs, launch.warps) if splits == 1 and fits else splits


def takes_clusters(major: int, shared_bytes: int) -> bool:
    """Whether a card of this capability, with so much shared memory on a multiprocessor, runs blocks in clusters."""
    return major >= 9 and shared_bytes >= CLUSTER_ROOM_BYTES


def in_clusters(launch: Launch, num_splits: int) -> tuple[Launch, int]:
    """The launch by the largest clusters that so many splits fill, and the splits of whole clusters."""
    cluster = min(MAX_CLUSTER, 1 << num_splits.bit_length() - 1)
    return replace(launch, cluster=cluster), num_splits // cluster * cluster
