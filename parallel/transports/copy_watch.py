"""The limit on waits that have no kernel: a thread that sees a peer fall silent, says so, and lets the card go on.

A card that awaits a flag in a stream waits for ever; nothing can call it back. But flags lie in memory that the host
can write. A rank waits for a peer while it has itself raised more flags than the peer has. If the peer raises none for
as long as it may take, this rank writes its error word and then all flags far ahead, so that every card runs on, over
what is wrong now. Every rank reads all error words before it believes a result, hence whoever got a wrong sum by this
sees the error too: the word was there before the flags were.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from parallel.transports.copy_layout import COUNTS

# A tenth of a second more does not matter to a limit of seconds, and the thread costs the rank nothing that shows.
INTERVAL_SEC = 0.1
# Beyond all waits that are queued now or soon, and still ahead of them as counts that wrap.
RELEASE = COUNTS // 4


class Word(Protocol):
    """4 bytes of memory that all ranks see."""

    value: int


class Silence:
    """Which peer has raised no flag for too long while this rank's are ahead of it."""

    def __init__(self) -> None:
        self.since: dict[int, tuple[tuple[int, ...], float]] = {}

    def find(
        self, own: Sequence[int], peers: Mapping[int, tuple[int, ...]], now: float, limit_sec: float
    ) -> int | None:
        """`own` and `peers`: the counts of each lane, now. To be asked every now and then."""
        for peer, counts in peers.items():
            if not any(is_behind(theirs, ours) for theirs, ours in zip(counts, own, strict=True)):
                self.since.pop(peer, None)
                continue
            seen = self.since.get(peer)
            if seen is None or seen[0] != counts:
                self.since[peer] = (counts, now)
            elif now - seen[1] >= limit_sec:
                return peer
        return None


def is_behind(count: int, other: int) -> bool:
    """Of counts that wrap: both are within half of what 32 bits count."""
    return 0 < (other - count) % COUNTS < COUNTS // 2


class CopyWatch:
    """Watches the flags of all ranks from a thread of its own until it is stopped.

    Args:
        flags: by rank and lane.
        errors: by rank; a word other than 0 is the peer that did not answer that rank, plus one.
    """

    def __init__(self, rank: int, flags: Sequence[Sequence[Word]], errors: Sequence[Word], timeout_sec: float) -> None:
        self.rank, self.flags, self.errors, self.timeout_sec = rank, flags, errors, timeout_sec
        # Flags that this rank will have raised after all that is queued, by lane.
        self.queued = [0] * len(flags[rank])
        self.silence = Silence()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="host memory copies", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.stopped.set()
        if self.thread.is_alive():
            self.thread.join()

    def look(self, now: float) -> None:
        """What the thread does each time."""
        if not any(word.value for word in self.errors):
            missing = self._find_silent(now)
            if missing is None:
                return
            self.errors[self.rank].value = missing + 1
        self._release()

    def failure(self) -> tuple[int, int] | None:
        """(the peer that did not answer, the rank that waited for it)."""
        found = ((word.value - 1, rank) for rank, word in enumerate(self.errors) if word.value)
        return next(found, None)

    def _find_silent(self, now: float) -> int | None:
        counts = [tuple(word.value for word in words) for words in self.flags]
        peers = {rank: each for rank, each in enumerate(counts) if rank != self.rank}
        return self.silence.find(counts[self.rank], peers, now, self.timeout_sec)

    def _release(self) -> None:
        """Again each time: a card that is late may still write what it was told to."""
        for words in self.flags:
            for lane, word in enumerate(words):
                word.value = (self.queued[lane] + RELEASE) % COUNTS

    def _run(self) -> None:
        while not self.stopped.wait(min(INTERVAL_SEC, self.timeout_sec / 4)):
            self.look(time.monotonic())
