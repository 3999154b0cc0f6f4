"""What passes of prompts queue, run as it is or recorded, as CUDA graphs on a card; few are recorded at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from parallel.engine.graphs import capture

# What does again what was captured.
Replay = Callable[[], object]
Record = Callable[[Sequence[Callable[[], None]], Any], list[Replay]]


def capture_all(calls: Sequence[Callable[[], None]], pool: Any) -> list[Replay]:
    """A graph of each. All have been run, so that kernels are compiled and libraries set up; now they are not."""
    return [capture(call, pool, num_warm_ups=0).replay for call in calls]


class Places:
    """Bounds how many passes are recorded at a time.

    The first that come twice stay, so that a workload of more sizes does not capture again and again. Ranks make the
    same passes in the same order, so all of them decide alike at the same pass.
    """

    def __init__(self, num: int) -> None:
        assert num > 0
        self.num = num
        # All that were run, the last one at the end.
        self.runs: list[Recorded] = []

    def make_room(self, *, is_asked: bool) -> bool:
        """Whether one more may be recorded: there is room, or one gives its place. That is one that was recorded ahead
        and never used; where `is_asked`, else the one that was used longest ago."""
        held = [each for each in self.runs if each.is_recorded]
        if len(held) < self.num:
            return True
        leaving = next((each for each in held if each.is_idle), held[0] if is_asked else None)
        if leaving is None:
            return False
        leaving.forget()
        return True

    def note_run(self, recorded: Recorded) -> None:
        if recorded in self.runs:
            self.runs.remove(recorded)
        self.runs.append(recorded)

    def record_latest(self) -> None:
        """Records now as many as there are places: those that were run last."""
        for each in self.runs[-self.num :]:
            each.record_used(is_asked=True)


class Recorded:
    """Calls that are run as they are the first time, and from the second on as what `record` made of them, where
    `places` has room for it."""

    def __init__(self, calls: Sequence[Callable[[], None]], pool: Any, record: Record, places: Places) -> None:
        self.calls, self.pool, self.record, self.places = calls, pool, record, places
        self.replays: list[Replay] = list(calls)
        # `is_idle`: recorded ahead of its use.
        self.was_run = self.is_recorded = self.is_idle = False

    @contextmanager
    def use(self) -> Iterator[list[Replay]]:
        """What runs them this time: each once, in order. One that is broken off does not count."""
        self.record_used()
        self.is_idle = False
        yield self.replays
        self.was_run = True
        self.places.note_run(self)

    def prepare(self) -> None:
        """Records them now, and runs them before where they were not. If that fails, they hold no place."""
        if self.is_recorded:
            return
        try:
            if not self.was_run:
                with self.use() as calls:
                    for call in calls:
                        call()
            self.record_used(is_asked=True)
        except BaseException:
            self.forget()
            raise
        self.is_idle = True

    def record_used(self, *, is_asked: bool = False) -> None:
        """Records them now where they were run, and `places` has room; see Places.make_room."""
        if self.was_run and not self.is_recorded and self.places.make_room(is_asked=is_asked):
            self.replays, self.is_recorded = self.record(self.calls, self.pool), True

    def forget(self) -> None:
        """As if they had never been run."""
        if self.is_recorded and torch.cuda.is_initialized():
            # Their graphs may be running.
            torch.cuda.synchronize()
        self.replays = list(self.calls)
        self.was_run = self.is_recorded = self.is_idle = False
        if self in self.places.runs:
            self.places.runs.remove(self)
