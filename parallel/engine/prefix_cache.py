"""Pages that outlive their sequences: prompts that begin the same share the keys and values of what they share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from parallel.engine.page_allocator import PageAllocator
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.pages import SCRATCH_PAGE

# The page before, SCRATCH_PAGE at the start of a prompt, and the tokens of the page.
Key = tuple[int, tuple[int, ...]]


class PrefixCache(PageAllocator):
    """A PageAllocator that lends whole pages of a prompt to all who begin with the same tokens.

    Such a page is known by its tokens and by the page before it, so by every token up to its end; nothing is told by a
    hash alone. It is known from its reservation on: who reserved it later must not be prefilled before its keys and
    values are there, or queued (prefill/shares.py). Once nobody holds it, it waits, known, until pages are short: then
    the one that was given back first is lent anew.

    Who holds a known page holds all before it, and gives them back last page first. So none is lent anew before those
    that follow it, and a key never names a page that has become another's.
    """

    def reset(self) -> None:
        """As PageAllocator's; no page is known any more."""
        super().reset()
        self._known: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        # Of known pages: how many sequences have them.
        self._num_holders: dict[int, int] = {}
        # Known pages of nobody, in the order they were given back.
        self._idle: dict[int, None] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be lent: those that wait to be shared again count too."""
        return len(self._free) + len(self._idle)

    def reserve(self, prompt: Sequence[int], num: int) -> tuple[list[int], int]:
        """As PageAllocator's; never the whole prompt is there, as its last token must be computed for the next."""
        shared = self._find(prompt)
        num_idle = sum(page in self._idle for page in shared)
        self.check_free(num - len(shared) + num_idle)
        for page in shared:
            self._idle.pop(page, None)
            self._num_holders[page] += 1
        pages = shared + self.allocate(num - len(shared))
        self._learn(prompt, pages)
        return pages, len(shared) * PAGE_SIZE

    def allocate(self, num: int) -> list[int]:
        self.check_free(num)
        while len(self._free) < num:
            self._forget(next(iter(self._idle)))
        return super().allocate(num)

    def release(self, pages: Iterable[int]) -> None:
        for page in reversed(list(pages)):
            if page in self._keys:
                self._let_go(page)
            else:
                super().release([page])

    def _find(self, prompt: Sequence[int]) -> list[int]:
        """Known pages that hold the prompt's beginning, without its last token."""
        pages, before = list[int](), SCRATCH_PAGE
        for tokens in whole_pages(prompt[:-1]):
            page = self._known.get((before, tokens))
            if page is None:
                break
            pages.append(page)
            before = page
        return pages

    def _learn(self, prompt: Sequence[int], pages: Sequence[int]) -> None:
        before = SCRATCH_PAGE
        for tokens, page in zip(whole_pages(prompt), pages, strict=False):
            if self._known.setdefault((before, tokens), page) != page:
                # The last page of a prompt that another had: computed anew for its last token, and not shared.
                break
            self._keys[page] = (before, tokens)
            self._num_holders.setdefault(page, 1)
            before = page

    def _let_go(self, page: int) -> None:
        assert self._num_holders[page] > 0, f"{page=} is given back, but is not lent"
        self._num_holders[page] -= 1
        if self._num_holders[page] == 0:
            self._idle[page] = None

    def _forget(self, page: int) -> None:
        del self._idle[page], self._num_holders[page], self._known[self._keys.pop(page)]
        super().release([page])


def whole_pages(prompt: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The tokens of each page that the prompt fills."""
    for end in range(PAGE_SIZE, len(prompt) + 1, PAGE_SIZE):
        yield tuple(prompt[end - PAGE_SIZE : end])
