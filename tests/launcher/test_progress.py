"""What is said of a stage that ranks walk each for itself."""

from __future__ import annotations

import pytest

from launcher.progress import Stage, amount_text, clock_text


def stage(*reports: tuple[int, int, int, float]) -> Stage:
    """From (rank, done, total, second)."""
    made = Stage()
    for report in reports:
        made.update(*report)
    return made


def test_slowest_rank_is_the_one_with_the_smallest_share() -> None:
    assert stage((0, 5, 10, 1.0), (1, 80, 100, 1.0), (2, 4, 6, 1.0)).slowest()[0] == 0
    assert stage((0, 5, 10, 1.0), (1, 40, 100, 1.0), (0, 6, 10, 2.0)).slowest()[0] == 1


def test_rate_and_rest_count_from_the_first_report() -> None:
    both = stage((1, 10**9, 10 * 10**9, 5.0), (0, 9 * 10**9, 10 * 10**9, 6.0), (1, 4 * 10**9, 10 * 10**9, 7.0))
    assert both.text("bytes") == "rank 1: 4.00 GB of 10.00 GB, 1.50 GB/s, 0:04 left"


def test_first_report_gives_no_rate_and_the_last_no_rest() -> None:
    assert stage((0, 1, 2, 5.0)).text("bytes") == "0.0 MB of 0.0 MB"
    done = stage((0, 0, 4 * 10**9, 5.0), (0, 4 * 10**9, 4 * 10**9, 7.0))
    assert done.text("bytes") == "4.00 GB of 4.00 GB, 2.00 GB/s"


def test_what_is_no_bytes_has_no_rate() -> None:
    assert stage((0, 1, 9, 5.0), (0, 3, 9, 6.0)).text("prompts") == "3 of 9 prompts"
    assert stage((0, 1, 1, 5.0)).text("runs") == "1 of 1 run"


@pytest.mark.parametrize(("seconds", "text"), [(0.0, "0:00"), (4.2, "0:05"), (60.0, "1:00"), (759.5, "12:40")])
def test_clock_reads_well(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


@pytest.mark.parametrize(
    ("amount", "unit", "text"),
    [(7, "tokens", "7 tokens"), (1_200_000, "bytes", "1.2 MB"), (35_000_000_000, "bytes", "35.00 GB")],
)
def test_amounts_read_well(amount: int, unit: str, text: str) -> None:
    assert amount_text(amount, unit) == text
