"""Keys and values in pages of 64 tokens: their storage on the card, and who holds which page, on the host.

A token's slot is page * PAGE_SIZE + its place in the page. Page 0 belongs to nobody: rows that pad a batch write there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.engine.limits import PAGE_SIZE as PAGE_SIZE

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


class OutOfPagesError(RuntimeError):
    """More pages are asked for than are free."""


class PageAllocator:
    """Lends pages 1 to num_pages - 1; those given back last go out first."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.reset()

    def reset(self) -> None:
        """Takes all pages back, whoever has them."""
        self._free = list(range(self.num_pages - 1, SCRATCH_PAGE, -1))
        self._lent: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def check_free(self, num: int) -> None:
        if num > self.num_free:
            raise OutOfPagesError(
                f"{num} pages of {PAGE_SIZE} tokens asked for, {self.num_free} of {self.num_pages - 1} are free"
            )

    def reserve(self, prompt: Sequence[int], num: int) -> tuple[list[int], int]:
        """`num` pages for a prompt and its answer, and how many tokens of the prompt they hold already.

        Raises OutOfPagesError as `allocate`.
        """
        return self.allocate(num), 0

    def allocate(self, num: int) -> list[int]:
        """`num` pages nobody holds; raises OutOfPagesError, and lends none, where fewer are free."""
        self.check_free(num)
        pages = [self._free.pop() for _ in range(num)]
        self._lent.update(pages)
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Takes pages back; their content may still be read until they are lent again and written."""
        for page in pages:
            assert page in self._lent, f"{page=} is given back, but is not lent"
            self._lent.remove(page)
            self._free.append(page)


def positions_and_slots(ranges: Sequence[tuple[Sequence[int], int, int]]) -> tuple[Tensor, Tensor]:
    """Of sequences with these pages, one after the other, the positions start to end - 1, and their slots.

    [tokens] int64 each, CPU, in as many operations for many ranges as for one: each takes some microseconds.
    """
    starts, ends, counts = torch.tensor([[start, end, len(pages)] for pages, start, end in ranges]).unbind(1)
    held = torch.tensor([page for pages, _, _ in ranges for page in pages])
    lengths = ends - starts
    of = torch.arange(len(ranges)).repeat_interleave(lengths)
    positions = torch.arange(len(of)) - (lengths.cumsum(0) - ends)[of]
    slots = held[(counts.cumsum(0) - counts)[of] + positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    return positions, slots


def as_bits(stored: Tensor) -> Tensor:
    """fp8 as bytes, which every operator can index; the rest as it is."""
    return stored.view(torch.uint8) if stored.dtype == FP8 else stored
