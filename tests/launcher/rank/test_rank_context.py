"""What torch may take of a card whose memory is limited."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config import LimitsConfig, TimeoutsConfig
from launcher.events import EventWriter
from launcher.job import Job
from launcher.plan.plan import DRIVER_RESERVED_BYTES
from launcher.processes.ranks import rank_environment
from launcher.rank import context
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


def test_rank_that_the_first_never_answers_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection is taken by the socket that the parent has opened, which nobody serves."""
    server, aborted = socket.create_server(("127.0.0.1", 0)), list[tuple[int, str]]()

    def abort(job: Job, rank: int, error: Exception) -> None:
        aborted.append((rank, str(error)))
        server.close()

    monkeypatch.setattr(context, "abort_rank", abort)
    monkeypatch.setattr(context, "JOIN_GRACE_SEC", 0.0)
    for name, value in rank_environment(1, 2, server.getsockname()[1]).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = make_job(tmp_path, run=make_run(timeouts=TimeoutsConfig(collective_sec=0.5)))
    with pytest.raises(RuntimeError), context.joined_rank(job, 1, EventWriter(tmp_path, rank=1)):
        pass
    [(rank, words)] = aborted
    assert rank == 1 and "rank 0 did not answer rank 1 for 0.5 s (timeouts.collective_sec)" in words
