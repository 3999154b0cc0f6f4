"""The limit on waits that have no kernel: a thread that sees a peer fall silent, says so, and lets the card go on.

A card that awaits a flag in a stream waits for ever; nothing can call it back. But flags lie in memory that the host
can write. A rank waits for a peer at a meeting where its own word is still up and the peer's is not: who has met
everybody puts all words back. If the peer adds nothing up for as long as it may take, this rank writes its error word
and then raises all flags, again and again, so that every card runs on, over what is wrong now. Every rank reads all
error words before it believes a result, hence whoever got a wrong sum by this sees the error too: the word was there
before the flags were.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

# A tenth of a second more does not matter to a limit of seconds, and the thread costs the rank nothing that shows.
INTERVAL_SEC = 0.1
# Each release lets a lane of a card go on by one meeting, of some hundreds that may be queued.
RELEASE_INTERVAL_SEC = 0.0005


class Word(Protocol):
    """4 bytes of memory that all ranks see."""

    value: int


# By writer and reader.
Meeting = Sequence[Sequence[Word]]


class Silence:
    """Which peer has been waited for too long while it did nothing."""

    def __init__(self) -> None:
        self.since: dict[int, tuple[int, float]] = {}

    def find(self, awaited: Iterable[int], progress: Mapping[int, int], now: float, limit_sec: float) -> int | None:
        """`awaited`: peers, now; `progress`: differs whenever a peer has done something. To be asked now and then."""
        before, self.since = self.since, {}
        for peer in awaited:
            seen = before.get(peer)
            self.since[peer] = (progress[peer], now) if seen is None or seen[0] != progress[peer] else seen
        return next((peer for peer, (_, since) in self.since.items() if now - since >= limit_sec), None)


class CopyWatch:
    """Watches the flags of all ranks from a thread of its own until it is stopped.

    Args:
        meetings: of all lanes.
        progress: of each rank, by its card.
        errors: by rank; a word other than 0 is the peer that did not answer that rank, plus one.
    """

    def __init__(
        self,
        rank: int,
        meetings: Sequence[Meeting],
        progress: Sequence[Word],
        errors: Sequence[Word],
        timeout_sec: float,
    ) -> None:
        self.rank, self.meetings, self.progress, self.errors = rank, meetings, progress, errors
        self.timeout_sec = timeout_sec
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
        if self.failure() is None:
            progress = {rank: word.value for rank, word in enumerate(self.progress)}
            missing = self.silence.find(self._awaited(), progress, now, self.timeout_sec)
            if missing is None:
                return
            self.errors[self.rank].value = missing + 1
        self._release()

    def failure(self) -> tuple[int, int] | None:
        """(the peer that did not answer, the rank that waited for it)."""
        found = ((word.value - 1, rank) for rank, word in enumerate(self.errors) if word.value)
        return next(found, None)

    def _awaited(self) -> list[int]:
        peers = [peer for peer in range(len(self.errors)) if peer != self.rank]
        return [peer for peer in peers if any(self._waits_for(peer, meeting) for meeting in self.meetings)]

    def _waits_for(self, peer: int, meeting: Meeting) -> bool:
        return bool(meeting[self.rank][peer].value and not meeting[peer][self.rank].value)

    def _release(self) -> None:
        """Again each time: cards put the words back, and wait for them at the next meeting."""
        for meeting in self.meetings:
            for writer, words in enumerate(meeting):
                for reader, word in enumerate(words):
                    if writer != reader:
                        word.value = 1

    def _run(self) -> None:
        while not self.stopped.wait(self._interval()):
            self.look(time.monotonic())

    def _interval(self) -> float:
        return RELEASE_INTERVAL_SEC if self.failure() else min(INTERVAL_SEC, self.timeout_sec / 4)
