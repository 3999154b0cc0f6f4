import random

import pytest

from parallel.partition import PartitionError, choose_grain, split_by_grain, split_by_heads

WORLD_SIZES = (1, 2, 3, 4)
LLAMA_70B = {"intermediate_size": 28672, "vocab_size": 128256}
QWEN_72B = {"intermediate_size": 29568, "vocab_size": 152064}


def deepspeed_sizes(
    total: int, world_size: int, name: str, grain: int = 1, num_kv_heads: int | None = None
) -> list[int]:
    from deepspeed.module_inject.tp_shard import AutoTPMeta, get_shard_size_list

    return get_shard_size_list(total, world_size, AutoTPMeta(num_kv_heads=num_kv_heads, tp_grain_size=grain), name)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj", "lm_head"])
def test_grain_split_equals_deepspeeds(world_size: int, name: str) -> None:
    draw = random.Random(world_size)
    for _ in range(500):
        total, grain = draw.randint(1, 160_000), 2 ** draw.randint(0, 7)
        # DeepSpeed must not fall back on heads for these names, whatever the heads are.
        theirs = deepspeed_sizes(total, world_size, name, grain, num_kv_heads=draw.randint(1, 64))
        assert list(split_by_grain(total, world_size, grain)) == theirs


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"])
def test_head_split_equals_deepspeeds(world_size: int, name: str) -> None:
    draw = random.Random(world_size)
    for _ in range(500):
        num_kv_heads, group, head_dim = draw.randint(1, 64), draw.randint(1, 16), draw.choice([4, 64, 80, 128])
        for total in (num_kv_heads * head_dim, num_kv_heads * group * head_dim):
            theirs = deepspeed_sizes(total, world_size, name, grain=128, num_kv_heads=num_kv_heads)
            assert list(split_by_heads(total, world_size, num_kv_heads)) == theirs


def test_eight_heads_over_three_ranks_are_three_three_two() -> None:
    assert split_by_heads(64 * 128, 3, 8) == (3072, 3072, 2048)


def test_ranks_beyond_the_kv_heads_hold_none() -> None:
    assert split_by_heads(256, 4, 2) == (128, 128, 0, 0)


@pytest.mark.parametrize("sizes", [LLAMA_70B, QWEN_72B])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_70b_shards_are_whole_quantisation_groups(sizes: dict[str, int], world_size: int) -> None:
    grain = choose_grain(sizes.values(), world_size)
    assert grain == 128
    assert all(size % 128 == 0 for size in split_by_grain(sizes["intermediate_size"], world_size, grain))


@pytest.mark.parametrize(
    ("dims", "world_size", "grain"), [((128, 512), 1, 128), ((256, 512), 3, 64), ((96, 1000), 4, 16), ((4, 4), 4, 1)]
)
def test_grain_is_halved_until_every_rank_gets_one(dims: tuple[int, ...], world_size: int, grain: int) -> None:
    assert choose_grain(dims, world_size) == grain
    assert all(min(split_by_grain(dim, world_size, grain)) >= grain for dim in dims)


def test_dimension_smaller_than_the_ranks_is_refused() -> None:
    with pytest.raises(PartitionError, match=r"a dimension of 3 cannot be dealt over 4 ranks\. Use gpus=3"):
        choose_grain((3, 512), 4)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(PartitionError, match="100 cannot be dealt in 8 key/value heads"):
        split_by_heads(100, 2, 8)


def test_arguments_below_one_are_refused() -> None:
    with pytest.raises(PartitionError, match="world_size=0"):
        split_by_grain(10, 0, 1)
