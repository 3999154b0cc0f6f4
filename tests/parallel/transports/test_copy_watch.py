"""What the host makes of flags that do not come: who is silent, who is told, and that no card waits for ever."""

from __future__ import annotations

import time
from types import SimpleNamespace

from parallel.transports.copy_watch import CopyWatch, Silence


def test_a_peer_is_silent_only_while_it_is_waited_for() -> None:
    silence = Silence()
    # Who is not waited for may do nothing for ever so long.
    assert silence.find([], {1: 3, 2: 4}, 0.0, 1.0) is None
    assert silence.find([1], {1: 3, 2: 4}, 99.0, 1.0) is None
    # From here on both are waited for; rank 2 is once not, which ends its silence.
    assert silence.find([1, 2], {1: 3, 2: 4}, 99.5, 1.0) is None
    assert silence.find([1], {1: 3, 2: 4}, 99.9, 1.0) is None
    assert silence.find([1, 2], {1: 3, 2: 4}, 100.0, 1.0) == 1


def test_a_peer_that_adds_something_up_is_not_silent() -> None:
    silence = Silence()
    for step in range(10):
        assert silence.find([1], {1: (2**32 - 4 + step) % 2**32}, step * 0.9, 1.0) is None
    assert silence.find([1], {1: 5}, 9.0, 1.0) is None
    assert silence.find([1], {1: 5}, 9.2, 1.0) == 1


Meetings = list[list[list[SimpleNamespace]]]


def opened(timeout_sec: float) -> tuple[list[CopyWatch], Meetings, list[SimpleNamespace]]:
    """Three ranks' watches over the same words, of two meetings."""
    meetings = [[[SimpleNamespace(value=0) for _ in range(3)] for _ in range(3)] for _ in range(2)]
    progress, errors = ([SimpleNamespace(value=0) for _ in range(3)] for _ in range(2))
    return [CopyWatch(rank, meetings, progress, errors, timeout_sec) for rank in range(3)], meetings, progress


def test_the_one_that_is_missing_is_named_and_not_who_waits_for_it_too() -> None:
    watches, meetings, progress = opened(1.0)
    # Ranks 0 and 1 have come to the second meeting, and wait for rank 2.
    for writer in (0, 1):
        for reader in {0, 1, 2} - {writer}:
            meetings[1][writer][reader].value = 1
    for now in (0.0, 0.9):
        watches[0].look(now)
        watches[2].look(now)
        assert watches[0].failure() is None and meetings[1][2][0].value == 0
    # Others go on meanwhile, which does not help it; rank 2 itself waits for nobody.
    progress[1].value = 5
    watches[2].look(1.0)
    assert watches[2].failure() is None
    watches[0].look(1.0)
    # Everyone sees the error, and no card has to wait.
    assert [watch.failure() for watch in watches] == [(2, 0)] * 3
    flags = [
        each[writer][reader] for each in meetings for writer in range(3) for reader in range(3) if writer != reader
    ]
    assert all(flag.value for flag in flags)
    # A card puts back what it has waited for: the next look of anyone lets it go on again.
    meetings[1][2][0].value = 0
    watches[1].look(1.1)
    assert all(flag.value for flag in flags)
    assert watches[1].failure() == (2, 0)


def test_who_has_met_everybody_waits_for_none() -> None:
    watches, meetings, _ = opened(1.0)
    # All have come; rank 1 has put back what the others wrote, and they have not yet.
    for writer in range(3):
        for reader in {0, 1, 2} - {writer, 1}:
            meetings[0][writer][reader].value = 1
    for watch in (watches[0], watches[2]):
        watch.look(0.0)
        watch.look(9.0)
        assert watch.failure() is None


def test_the_thread_looks_by_itself_until_it_is_stopped() -> None:
    watches, meetings, _ = opened(0.05)
    meetings[0][1][0].value = 1
    watches[1].start()
    while watches[0].failure() is None:
        time.sleep(0.01)
    # Again and again.
    meetings[0][0][1].value = 0
    while not meetings[0][0][1].value:
        time.sleep(0.01)
    watches[1].stop()
    assert not watches[1].thread.is_alive()
    assert watches[1].failure() == (0, 1)
