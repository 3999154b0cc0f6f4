"""The time that one in a hundred exceeds."""

from __future__ import annotations

import random

import pytest

from parallel.timing import p99


@pytest.mark.parametrize(("num", "num_longer"), [(1, 0), (2, 0), (99, 0), (100, 1), (199, 1), (200, 2), (1050, 10)])
def test_one_in_a_hundred_is_longer(num: int, num_longer: int) -> None:
    times = [float(time) for time in range(num)]
    found = p99(random.sample(times, num))
    assert sum(time > found for time in times) == num_longer
