"""Ranks while they are watched."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.watch import watch_ranks
from tests.launcher.jobs import make_job
from tests.launcher.plans import CPU


def test_process_with_the_id_of_an_earlier_rank_is_none_of_this_run(tmp_path: Path) -> None:
    """A folder that is used again may have been that of more ranks, and ids are given out anew."""
    (tmp_path / "ranks").mkdir()
    for rank in (0, 1):
        (tmp_path / "ranks" / f"{rank}.pid").write_text(str(os.getpid()))
    (usage,) = watch_ranks(make_job(tmp_path, world_size=1), CPU, lambda job, file: None).summary()
    assert usage.peak_bytes is None
