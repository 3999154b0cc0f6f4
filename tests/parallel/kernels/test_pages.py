"""Pages: who holds which, what is stored where, and what fp8 storage does to a number."""

from __future__ import annotations

import pytest
import torch

from parallel.engine.page_allocator import OutOfPagesError, PageAllocator, positions_and_slots
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.pages import FP8, PagedKV, allocate_pages, move_tokens, pages_for
from parallel.kernels.ranges_attention import keys_at, rows_of
from tests.parallel.paged import slots_of, write_kv

DTYPES = [torch.float32, torch.bfloat16, torch.float16, FP8]


def poisoned(num_pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> PagedKV:
    shape = (num_pages, kv_heads, PAGE_SIZE, head_dim)
    return PagedKV(*(torch.full(shape, float("nan")).to(dtype) for _ in range(2)))


def test_pages_are_lent_once_and_the_scratch_page_never() -> None:
    allocator = PageAllocator(10)
    first, second = allocator.allocate(4), allocator.allocate(5)
    assert sorted(first + second) == list(range(1, 10))
    allocator.release(first)
    assert allocator.num_free == 4
    assert set(allocator.allocate(4)) == set(first)


def test_asking_for_more_pages_than_are_free_says_so_and_lends_none() -> None:
    allocator = PageAllocator(4)
    allocator.allocate(1)
    with pytest.raises(OutOfPagesError, match="3 pages of 64 tokens asked for, 2 of 3 are free"):
        allocator.allocate(3)
    assert allocator.num_free == 2


@pytest.mark.parametrize("pages", [[1, 1], [2], [0]])
def test_a_page_that_is_not_lent_cannot_be_given_back(pages: list[int]) -> None:
    allocator = PageAllocator(4)
    assert allocator.allocate(1) == [1]
    with pytest.raises(AssertionError, match="is not lent"):
        allocator.release(pages)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_are_separate_contiguous_zeros(dtype: torch.dtype) -> None:
    layers = allocate_pages(3, 4, 2, 8, dtype, "cpu")
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    assert all(tensor.is_contiguous() and tensor.dtype == dtype for tensor in tensors)
    assert all(tensor.shape == (4, 2, PAGE_SIZE, 8) for tensor in tensors)
    assert not torch.stack([tensor.float() for tensor in tensors]).any()
    assert len({tensor.data_ptr() for tensor in tensors}) == 6
    write_kv(layers[1], torch.ones(1, 2, 8), torch.ones(1, 2, 8), torch.tensor([70]))
    assert [bool(tensor.float().any()) for tensor in tensors] == [False, False, True, True, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_what_is_written_token_by_token_is_gathered(dtype: torch.dtype, length: int) -> None:
    kv = poisoned(8, 3, 16, dtype)
    pages = [5, 2, 7, 1][: pages_for(length)]
    keys, values = torch.randn(2, length, 3, 16).to(dtype).float()
    for start, end in ((0, length // 2), (length // 2, length)):
        write_kv(kv, keys[start:end], values[start:end], slots_of(pages, start, end))
    found = keys_at(kv, rows_of(slots_of(pages, 0, length), 3), torch.float32)
    assert all(tensor.is_contiguous() for tensor in found)
    torch.testing.assert_close(torch.stack(found), torch.stack([keys, values]), rtol=0, atol=0)
    # Nothing else was touched: every other slot still holds its poison.
    assert int(kv.keys.float().isnan().all(-1).all(1).sum()) == 8 * PAGE_SIZE - length


def test_a_slot_is_a_page_and_a_place_in_it() -> None:
    kv = poisoned(4, 2, 8, torch.float32)
    key, value = torch.randn(2, 1, 2, 8)
    write_kv(kv, key, value, slots_of([3, 2], 64 + 5, 64 + 6))
    assert torch.equal(kv.keys[2, :, 5], key[0])
    assert torch.equal(kv.values[2, :, 5], value[0])


def test_slots_of_many_sequences_follow_one_another() -> None:
    """Ranges that begin and end anywhere, an empty one, and pages beyond their ends."""
    ranges = [([3, 7, 2], 60, 130), ([5], 0, 1), ([9, 4], 64, 64), ([1, 8, 6], 127, 129)]
    expected = [
        (at, pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE) for pages, *ends in ranges for at in range(*ends)
    ]
    positions, slots = positions_and_slots(ranges)
    assert list(zip(positions.tolist(), slots.tolist(), strict=True)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_moved_tokens_are_read_before_any_is_written(dtype: torch.dtype) -> None:
    """Slots of several pages, targets among the sources, in every layer; the rest stays."""
    layers = allocate_pages(3, 5, 2, 8, dtype, "cpu")
    for layer in layers:
        for tensor in (layer.keys, layer.values):
            tensor.copy_(torch.randn(tensor.shape))
    sources, targets = torch.randperm(5 * PAGE_SIZE).split(40)[:2]
    targets[:10] = sources[10:20]
    before = [(layer.keys.float(), layer.values.float()) for layer in layers]
    move_tokens(layers, sources, targets)
    for layer, old in zip(layers, before, strict=True):
        for tensor, wanted in zip((layer.keys, layer.values), old, strict=True):
            kept = wanted.clone()
            for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
                wanted[target // PAGE_SIZE, :, target % PAGE_SIZE] = kept[source // PAGE_SIZE, :, source % PAGE_SIZE]
            assert torch.equal(tensor.float(), wanted)


def test_tokens_of_layers_from_elsewhere_are_not_moved() -> None:
    layers = [allocate_pages(1, 2, 2, 8, torch.float32, "cpu")[0] for _ in range(2)]
    with pytest.raises((AssertionError, RuntimeError)):
        move_tokens(layers, torch.tensor([1]), torch.tensor([2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_saturates_and_rounds_to_the_nearest(dtype: torch.dtype) -> None:
    kv = poisoned(2, 1, 8, FP8)
    new = torch.tensor([1e4, -1e4, 448, 460, -500, 1.0625, 17.1, 0.0], dtype=dtype).view(1, 1, 8)
    write_kv(kv, new, -new, torch.tensor([64]))
    expected = torch.tensor([448, -448, 448, 448, -448, 1.0, 18, 0])
    assert torch.equal(kv.keys[1, 0, 0].float(), expected)
    assert torch.equal(kv.values[1, 0, 0].float(), -expected)
