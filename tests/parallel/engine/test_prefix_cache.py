"""Shared pages: who finds which, when they are given up, and that nobody reads a page that is another's."""

from __future__ import annotations

import pytest

from parallel.engine.page_allocator import OutOfPagesError, PageAllocator
from parallel.engine.prefix_cache import PrefixCache
from parallel.kernels.limits import PAGE_SIZE


def blocks(text: str, extra: int = 0) -> list[int]:
    """A prompt of a page for each letter, and `extra` tokens."""
    return [ord(letter) for letter in text for _ in range(PAGE_SIZE)] + [1] * extra


def reserve(cache: PageAllocator, text: str, extra: int = 1) -> tuple[list[int], int]:
    """Pages for a prompt and the page of its answer, and how many were found."""
    pages, num_reused = cache.reserve(blocks(text, extra), len(text) + 1)
    assert num_reused % PAGE_SIZE == 0
    return pages, num_reused // PAGE_SIZE


def num_found(cache: PrefixCache, text: str, extra: int = 1) -> int:
    """Found by a prompt that comes and goes, which makes those it found the newest."""
    pages, found = reserve(cache, text, extra)
    cache.release(pages)
    return found


@pytest.mark.parametrize("has_ended", (False, True))
def test_whole_pages_that_begin_the_same_are_shared(has_ended: bool) -> None:
    """Of a sequence that runs, and of one that has ended."""
    cache = PrefixCache(40)
    first, found = reserve(cache, "abc", extra=PAGE_SIZE - 1)
    assert (found, len(set(first))) == (0, 4)
    if has_ended:
        cache.release(first)
    second, found = reserve(cache, "abd")
    assert (found, second[:2]) == (2, first[:2])
    assert not set(second[2:]) & set(first[:3])
    assert num_found(cache, "abc") == 3
    assert num_found(cache, "ab") == 2


@pytest.mark.parametrize("text", ("bc", "b", "ba", "xabc", "acb", "cab"))
def test_equal_pages_after_other_tokens_are_not_the_same(text: str) -> None:
    cache = PrefixCache(40)
    reserve(cache, "abc")
    assert num_found(cache, text) == (1 if text[0] == "a" else 0)


@pytest.mark.parametrize("place", (0, PAGE_SIZE - 1, PAGE_SIZE, 2 * PAGE_SIZE - 1))
def test_one_other_token_ends_what_is_shared(place: int) -> None:
    cache, prompt = PrefixCache(40), blocks("ab", 1)
    cache.reserve(prompt, 3)
    changed = [*prompt[:place], 7, *prompt[place + 1 :]]
    assert cache.reserve(changed, 3)[1] == place // PAGE_SIZE * PAGE_SIZE


@pytest.mark.parametrize(("extra", "found"), [(0, 1), (1, 2), (PAGE_SIZE, 2)])
def test_last_token_of_a_prompt_is_never_found(extra: int, found: int) -> None:
    cache = PrefixCache(40)
    reserve(cache, "ab", extra=0)
    assert num_found(cache, "ab", extra) == found


def test_page_of_prompt_and_answer_is_not_shared() -> None:
    cache = PrefixCache(40)
    first, _ = reserve(cache, "a", extra=40)
    second, found = reserve(cache, "a", extra=40)
    assert found == 1
    assert first[1] != second[1]


def test_page_that_was_computed_twice_serves_once() -> None:
    """A prompt of whole pages takes its last page anew, although it is known: both come back, one stays known."""
    cache = PrefixCache(10)
    first, second = reserve(cache, "ab", extra=0)[0], reserve(cache, "ab", extra=0)[0]
    assert first[0] == second[0]
    assert len({*first, *second}) == 5
    for pages in (second, first):
        cache.release(pages)
    assert cache.num_free == 9
    assert reserve(cache, "ab")[0][:2] == first[:2]


def test_what_nobody_holds_goes_when_pages_are_short_the_last_page_of_the_oldest_first() -> None:
    cache = PrefixCache(1 + 7)
    for text in ("abc", "xy"):
        cache.release(reserve(cache, text)[0])
    assert cache.num_free == 7
    assert num_found(cache, "ab") == 2
    # Known, oldest first: c, y, x, b, a. Two pages are free.
    for num_lent, expected in ((2, "abc xy"), (3, "ab xy"), (4, "ab x"), (5, "ab"), (6, "a"), (7, "")):
        lent = cache.allocate(num_lent)
        known = {key for key in ("abc", "ab", "a", "xy", "x") if len(cache._find(blocks(key, 1))) == len(key)}
        assert known == {part[:size] for part in expected.split() for size in range(1, len(part) + 1)}
        cache.release(lent)


def test_pages_that_are_held_are_not_given_up() -> None:
    cache = PrefixCache(1 + 5)
    held, _ = reserve(cache, "ab")
    other, _ = reserve(cache, "a")
    cache.release(other)
    with pytest.raises(OutOfPagesError, match="3 pages of 64 tokens asked for, 2 of 5 are free"):
        cache.allocate(3)
    assert not set(cache.allocate(2)) & set(held)
    assert cache.num_free == 0
    cache.release(held)
    assert cache.num_free == 3


def test_reservation_counts_what_it_finds_and_changes_nothing_where_pages_are_short() -> None:
    cache = PrefixCache(1 + 4)
    cache.release(reserve(cache, "ab")[0])
    cache.allocate(2)
    for _ in range(2):
        # Two pages are to be had, and it wants both, and two more.
        with pytest.raises(OutOfPagesError):
            reserve(cache, "abc")
        assert cache.num_free == 2
    assert cache.reserve(blocks("ab", 1), 2)[1] == 2 * PAGE_SIZE


@pytest.mark.parametrize("pages", ([1, 1], [2, 1, 2], [0], [3]))
def test_page_that_is_not_lent_cannot_be_given_back(pages: list[int]) -> None:
    cache = PrefixCache(4)
    assert reserve(cache, "a")[0] == [1, 2]
    with pytest.raises(AssertionError, match="is not lent"):
        cache.release(pages)


def test_without_the_cache_nothing_is_found() -> None:
    pages = PageAllocator(10)
    first, second = reserve(pages, "ab"), reserve(pages, "ab")
    assert (first[1], second[1], len({*first[0], *second[0]})) == (0, 0, 6)
