"""How a dimension is dealt over the ranks of a tensor-parallel group.

The rule is the one DeepSpeed AutoTP follows (deepspeed/module_inject/tp_shard.py, `get_shard_size`), written again
without torch, so that a plan made on a login node agrees with what the ranks will hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

# One quantisation group of the common 4-bit formats: a cut inside a group would separate weights from their scale.
QUANT_GROUP = 128


class PartitionError(ValueError):
    """A dimension that cannot be dealt over that many ranks; the message names both."""


@cache
def split_by_grain(total: int, world_size: int, grain: int) -> tuple[int, ...]:
    """Deal `total` in whole grains, the first ranks taking one more; the last rank also takes what is left over.

    Meant for the intermediate size of an MLP and for the vocabulary. A total below one grain is dealt one by one.

    Returns:
        One size per rank, in rank order; they add up to `total`.

    Raises:
        PartitionError: an argument is below 1.
    """
    _check_positive(total=total, world_size=world_size, grain=grain)
    if total < grain:
        return _deal(total, world_size)
    num_grains, remainder = divmod(total, grain)
    sizes = [num * grain for num in _deal(num_grains, world_size)]
    sizes[-1] += remainder
    return tuple(sizes)


@cache
def split_by_heads(total: int, world_size: int, num_kv_heads: int) -> tuple[int, ...]:
    """Deal a dimension of the attention in whole key/value heads, the first ranks taking one more.

    `total` is num_heads * head_dim for queries and outputs, num_kv_heads * head_dim for keys and values, or a number of
    heads. Query heads follow the key/value head that they read.

    Returns:
        One size per rank, in rank order; they add up to `total`. A rank beyond `num_kv_heads` gets 0.

    Raises:
        PartitionError: an argument is below 1, or `total` is no multiple of `num_kv_heads`.
    """
    _check_positive(total=total, world_size=world_size, num_kv_heads=num_kv_heads)
    if total % num_kv_heads:
        raise PartitionError(
            f"a dimension of {total} cannot be dealt in {num_kv_heads} key/value heads: "
            "it must be a multiple of them. Check num_heads and num_kv_heads of the model."
        )
    size_per_head = total // num_kv_heads
    return tuple(num * size_per_head for num in _deal(num_kv_heads, world_size))


def choose_grain(dims: Iterable[int], world_size: int) -> int:
    """The grain to cut all of `dims` with: one quantisation group, halved until every rank gets a grain of each.

    Raises:
        PartitionError: a dimension is smaller than `world_size`.
    """
    smallest = min(dims)
    if smallest < world_size:
        raise PartitionError(
            f"a dimension of {smallest} cannot be dealt over {world_size} ranks. Use gpus={max(smallest, 1)} or fewer."
        )
    grain = QUANT_GROUP
    while smallest // grain < world_size:
        grain //= 2
    return grain


def _deal(num_items: int, world_size: int) -> tuple[int, ...]:
    each, left = divmod(num_items, world_size)
    return tuple(each + (rank < left) for rank in range(world_size))


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise PartitionError(f"{name}={value} must be at least 1.")
