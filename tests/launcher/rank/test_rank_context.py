"""What torch may take of a card whose memory is limited."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config import LimitsConfig
from launcher.plan.plan import DRIVER_RESERVED_BYTES
from launcher.rank.context import allocator_limit
from parallel.units import GIB
from tests.launcher.jobs import make_job, make_run
from tests.launcher.plans import TINY, cards_of, plan


@pytest.mark.parametrize("gib", [6, 100])
def test_torch_gets_what_the_context_and_the_links_leave_of_a_card_of_that_size(tmp_path: Path, gib: int) -> None:
    """Of the card itself where the limit is beyond it."""
    limits = LimitsConfig(card_memory_gib=gib)
    decided = plan(TINY, cards_of(2, memory_bytes=10 * GIB), 2, limits=limits)
    job = replace(make_job(tmp_path, cards=True, run=make_run(limits=limits)), plan=decided)
    for rank in range(2):
        lines, limit = decided.cards[rank].lines, allocator_limit(job, rank)
        assert limit is not None and lines["context"] > 0 and lines["communicator"] > 0
        assert limit + lines["context"] + lines["communicator"] == min(gib, 10) * GIB - DRIVER_RESERVED_BYTES


def test_without_a_limit_torch_may_take_all_and_without_a_plan_the_limit(tmp_path: Path) -> None:
    assert allocator_limit(make_job(tmp_path, cards=True), 0) is None
    limited = make_run(limits=LimitsConfig(card_memory_gib=6))
    assert allocator_limit(make_job(tmp_path, cards=True, run=limited), 0) == 6 * GIB
