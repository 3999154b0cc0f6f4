"""Who has how much of a pass of prompts: the oldest half of it, who can end soonest the rest, and nobody too early."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from parallel.engine.prefill.shares import share_pass
from parallel.engine.prefix_cache import PrefixCache
from parallel.engine.sequence import TokenSequence
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.pages import pages_for


def sequences_of(*lengths: int) -> list[TokenSequence]:
    return [TokenSequence(index, [index] * length, 1, pages=[1 + index]) for index, length in enumerate(lengths)]


def shares(sequences: Sequence[TokenSequence], room: int) -> list[tuple[int, int, int]]:
    return [(part.sequence.index, part.start, part.end) for part in share_pass(sequences, room)]


def test_short_prompts_pass_a_long_one_that_has_half() -> None:
    sequences = sequences_of(1000, 30, 50, 10)
    assert shares(sequences, 100) == [(0, 0, 50), (1, 0, 30), (2, 0, 10), (3, 0, 10)]
    # What is not needed by others is the oldest's.
    assert shares(sequences, 300) == [(0, 0, 210), (1, 0, 30), (2, 0, 50), (3, 0, 10)]
    assert shares(sequences, 1) == [(0, 0, 1)]
    assert shares([], 100) == []


def test_prompts_of_one_length_are_read_one_after_the_other() -> None:
    sequences, read = sequences_of(100, 100, 100), []
    while parts := share_pass([each for each in sequences if not each.is_prefilled], 70):
        read.append([(part.sequence.index, part.start, part.end) for part in parts])
        for part in parts:
            part.sequence.num_prefilled = part.end
    assert read == [[(0, 0, 70)], [(0, 70, 100), (1, 0, 40)], [(1, 40, 100), (2, 0, 10)], [(2, 10, 80)], [(2, 80, 100)]]


def reserved(cache: PrefixCache, *prompts: list[int]) -> list[TokenSequence]:
    found = []
    for index, prompt in enumerate(prompts):
        sequence = TokenSequence(index, prompt, 1)
        sequence.pages, sequence.num_reused = cache.reserve(prompt, pages_for(len(prompt)))
        sequence.num_prefilled = sequence.num_reused
        found.append(sequence)
    return found


def test_who_reuses_what_another_reads_waits_for_it() -> None:
    """Of three prompts each goes on where the one before it ends; a fourth has nothing of them."""
    head = list(range(2 * PAGE_SIZE))
    sequences = reserved(PrefixCache(50), head, [*head, *[7] * 70], [*head, *[7] * 64, 8], [9] * 20)
    assert [each.num_reused for each in sequences] == [0, 128, 192, 0]
    assert shares(sequences, 120) == [(0, 0, 100), (3, 0, 20)]
    assert shares(sequences, 160) == [(0, 0, 128), (1, 128, 140), (3, 0, 20)]
    assert shares(sequences, 1000) == [(0, 0, 128), (1, 128, 198), (2, 192, 193), (3, 0, 20)]


@pytest.mark.parametrize("seed", range(30))
def test_a_pass_is_full_and_all_are_read_whoever_comes(seed: int) -> None:
    """While shorter prompts come without end, a prompt ends in at most twice the passes that those up to it take."""
    draw, room = random.Random(seed), random.Random(seed).choice((1, 7, 64, 200))
    waiting = [TokenSequence(index, [0] * draw.randint(1, 600), 1, pages=[index]) for index in range(5)]
    first, since = waiting[:], dict.fromkeys(waiting, 0)
    for number in range(1, 100_000):
        parts = share_pass(waiting, room)
        left = sum(len(each.prompt) - each.num_prefilled for each in waiting)
        assert sum(map(len, parts)) == min(room, left)
        assert [part.sequence for part in parts] == [each for each in waiting if any(each is p.sequence for p in parts)]
        for part in parts:
            assert part.start == part.sequence.num_prefilled
            part.sequence.num_prefilled = part.end
            since[part.sequence] = number
        waiting = [each for each in waiting if not each.is_prefilled]
        waiting.append(TokenSequence(number, [0] * draw.randint(1, room), 1, pages=[-number]))
        since[waiting[-1]] = number
        if all(each.is_prefilled for each in first):
            break
    before = 0
    for each in first:
        before += len(each.prompt)
        assert since[each] <= 2 * (before / room) + 2 * len(first) + 1
