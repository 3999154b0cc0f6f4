"""Keys and values in pages of 64 tokens: the KV cache as kernels read and write it.

A token's slot is page * PAGE_SIZE + its place in the page. Page 0 belongs to nobody: rows that pad a batch write there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.kernels.limits import PAGE_SIZE

SCRATCH_PAGE = 0
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class PagedKV:
    """One layer: keys and values, [num_pages, kv_heads, PAGE_SIZE, head_dim] each, contiguous."""

    keys: Tensor
    values: Tensor


def allocate_pages(
    num_layers: int, num_pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
) -> list[PagedKV]:
    """Storage of all layers in one allocation of num_layers * 2 * num_pages * kv_heads * 64 * head_dim zeros."""
    shape = (num_layers, 2, num_pages, kv_heads, PAGE_SIZE, head_dim)
    return [PagedKV(*layer) for layer in torch.zeros(shape, dtype=dtype, device=device)]


def move_tokens(caches: Sequence[PagedKV], sources: Tensor, targets: Tensor) -> None:
    """Copies the keys and values of the tokens in slots `sources` to slots `targets`, in every layer: [n] int64 each.

    All are read before any is written. Targets must differ, but for those in page 0. The layers are those of
    `allocate_pages`: two launches for all.
    """
    whole = whole_storage(caches)
    (from_pages, from_places), (to_pages, to_places) = (
        (each // PAGE_SIZE, each % PAGE_SIZE) for each in (sources, targets)
    )
    whole[:, :, to_pages, :, to_places] = whole[:, :, from_pages, :, from_places]


def whole_storage(caches: Sequence[PagedKV]) -> Tensor:
    """[layers, 2, pages, kv_heads, PAGE_SIZE, head_dim] of which `allocate_pages` made the layers; fp8 as bytes."""
    keys = as_bits(caches[0].keys)
    size = keys.numel()
    whole = keys.as_strided((len(caches), 2, *keys.shape), (2 * size, size, *keys.stride()))
    assert whole[-1, 1].data_ptr() == caches[-1].values.data_ptr(), "layers that were not allocated together"
    return whole


def pages_for(num_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-num_tokens // PAGE_SIZE)


def as_bits(stored: Tensor) -> Tensor:
    """fp8 as bytes, which every operator can index; the rest as it is."""
    return stored.view(torch.uint8) if stored.dtype == FP8 else stored
