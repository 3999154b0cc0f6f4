"""Requests that come over time, and how ranks agree on which are there: their clocks differ, their steps must not."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence

# Called by every rank at the same points: rank 0's `decide()` is everyone's answer.
Agree = Callable[[Callable[[], int]], int]


def alone(decide: Callable[[], int]) -> int:
    """Agreement of a single rank."""
    return decide()


class Arrivals:
    """Takes requests in the order in which they come.

    Args:
        times: seconds from now at which each comes, ascending.
        agree: lets ranks agree on how many have come. Between ranks it takes a message, once a pass until all are here.
    """

    def __init__(self, times: Sequence[float], agree: Agree = alone) -> None:
        assert list(times) == sorted(times), "requests arrive in order"
        self.start = time.perf_counter()
        self.times, self.agree = [self.start + each for each in times], agree
        self.num_taken = 0

    @property
    def all_taken(self) -> bool:
        return self.num_taken == len(self.times)

    def take(self, *, wait: bool) -> range:
        """Those that came since the last call, as places in `times`; with `wait`, at least one."""
        before = self.num_taken
        if not self.all_taken:
            self.num_taken = self.agree(lambda: self.count(wait=wait))
        return range(before, self.num_taken)

    def count(self, *, wait: bool) -> int:
        if wait:
            time.sleep(max(0.0, self.times[self.num_taken] - time.perf_counter()))
        return max(self.num_taken + wait, bisect_right(self.times, time.perf_counter()))
