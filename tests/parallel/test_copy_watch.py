"""What the host makes of flags that do not come: who is silent, who is told, and that no card waits for ever."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from parallel.transports.copy_layout import COUNTS
from parallel.transports.copy_watch import CopyWatch, Silence, is_behind


@pytest.mark.parametrize(
    ("count", "other", "behind"),
    [(0, 1, True), (1, 1, False), (2, 1, False), (COUNTS - 1, 0, True), (0, COUNTS - 1, False), (5, 5 + 2**30, True)],
)
def test_counts_wrap(count: int, other: int, behind: bool) -> None:
    assert is_behind(count, other) == behind


def test_a_peer_is_silent_only_while_it_is_waited_for() -> None:
    silence = Silence()
    # Equal counts for ever so long are no silence; nor is a peer that is ahead.
    assert silence.find((3, 0), {1: (3, 0), 2: (4, 0)}, 0.0, 1.0) is None
    assert silence.find((3, 0), {1: (3, 0), 2: (4, 0)}, 99.0, 1.0) is None
    # From here on rank 1 is behind, which counts from now.
    assert silence.find((4, 0), {1: (3, 0), 2: (4, 0)}, 100.0, 1.0) is None
    assert silence.find((5, 0), {1: (3, 0), 2: (4, 0)}, 100.9, 1.0) is None
    assert silence.find((5, 0), {1: (3, 0), 2: (5, 0)}, 101.0, 1.0) == 1


def test_a_peer_that_moves_is_not_silent() -> None:
    silence = Silence()
    for step in range(10):
        assert silence.find((50, step), {1: (40 + step, 0)}, step * 0.9, 1.0) is None
    # The second lane alone is waited for now.
    assert silence.find((49, 9), {1: (49, 0)}, 9.0, 1.0) is None
    assert silence.find((49, 9), {1: (49, 0)}, 10.0, 1.0) == 1


def opened(timeout_sec: float) -> tuple[list[CopyWatch], list[list[SimpleNamespace]]]:
    """Three ranks' watches over the same words."""
    flags = [[SimpleNamespace(value=0) for _ in range(2)] for _ in range(3)]
    errors = [SimpleNamespace(value=0) for _ in range(3)]
    return [CopyWatch(rank, flags, errors, timeout_sec) for rank in range(3)], flags


def test_one_that_gives_up_tells_all_and_lets_all_go_on() -> None:
    watches, flags = opened(1.0)
    for watch in watches:
        watch.queued = [7, 2]
    flags[0][0].value, flags[1][0].value = 5, 5
    for now in (0.0, 0.9):
        watches[0].look(now)
        assert watches[0].failure() is None and flags[2][0].value == 0
    watches[0].look(1.0)
    # Everyone sees the error, and every flag is beyond all that is queued.
    assert [watch.failure() for watch in watches] == [(2, 0)] * 3
    assert all(is_behind(count, word.value) for words in flags for count, word in zip((7, 2), words, strict=True))
    # A card that was late writes its own count once more: the next look of anyone releases it again.
    flags[2][0].value = 1
    watches[1].look(1.1)
    assert is_behind(7, flags[2][0].value)
    assert watches[1].failure() == (2, 0)


def test_the_thread_looks_by_itself_until_it_is_stopped() -> None:
    watches, flags = opened(0.05)
    flags[1][1].value = 1
    watches[1].start()
    while watches[0].failure() is None:
        time.sleep(0.01)
    watches[1].stop()
    assert not watches[1].thread.is_alive()
    assert watches[1].failure() in ((0, 1), (2, 1))
