"""Who holds which page of the KV cache (parallel/kernels/pages.py): the host's lists, and the slots that follow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.pages import SCRATCH_PAGE


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
