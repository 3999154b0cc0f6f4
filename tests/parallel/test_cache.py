"""The KV cache takes the planned storage once and keeps it."""

import pytest
import torch
from torch import Tensor

from parallel.engine.cache import KVCache

BATCH, HEADS, HEAD_DIM, CONTEXT, LAYERS = 2, 3, 5, 8, 2


def states(num_tokens: int, start: int = 0) -> Tensor:
    """[batch, heads, tokens, head_dim], each token filled with its number."""
    return torch.arange(start, start + num_tokens).float().view(1, 1, -1, 1).expand(BATCH, HEADS, num_tokens, HEAD_DIM)


def filled(num_tokens: int) -> KVCache:
    cache = KVCache(LAYERS, CONTEXT)
    for layer in range(LAYERS):
        cache.update(states(num_tokens), -states(num_tokens), layer)
    return cache


def pointers(cache: KVCache) -> list[int]:
    return [tensor.data_ptr() for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storage_is_taken_at_once_in_the_planned_size(dtype: torch.dtype) -> None:
    cache = KVCache(LAYERS, CONTEXT)
    assert cache.num_bytes() == 0
    for layer in range(LAYERS):
        cache.update(states(1).to(dtype), states(1).to(dtype), layer)
    assert cache.num_bytes() == LAYERS * 2 * BATCH * HEADS * CONTEXT * HEAD_DIM * torch.finfo(dtype).bits // 8
    assert {layer.keys.dtype for layer in cache.layers} == {dtype}


def test_filling_moves_nothing_and_takes_nothing_more() -> None:
    cache = filled(3)
    before = pointers(cache), cache.num_bytes()
    for start in range(3, CONTEXT):
        for layer in range(LAYERS):
            keys, values = cache.update(states(1, start), -states(1, start), layer)
            assert torch.equal(keys, states(start + 1))
            assert torch.equal(values, -states(start + 1))
            assert keys.data_ptr() == cache.layers[layer].keys.data_ptr(), "attention gets a view, not a copy"
        assert cache.get_seq_length() == start + 1
    assert (pointers(cache), cache.num_bytes()) == before


@pytest.mark.parametrize("num_tokens", (CONTEXT - 2, CONTEXT))
def test_more_tokens_than_planned_are_an_error(num_tokens: int) -> None:
    cache = filled(3)
    with pytest.raises(AssertionError, match="exceed"):
        cache.update(states(num_tokens), states(num_tokens), 0)
    assert cache.layers[0].length == 3


def test_rewind_forgets_the_newest_tokens_in_place() -> None:
    cache = filled(6)
    before = pointers(cache)
    cache.rewind(2)
    assert cache.get_seq_length() == 2
    keys, _ = cache.update(states(1, 50), states(1, 50), 1)
    assert keys[0, 0, :, 0].tolist() == [0, 1, 50]
    assert pointers(cache) == before


def test_reset_empties_and_keeps_the_storage() -> None:
    cache = filled(6)
    before = pointers(cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert pointers(cache) == before
