"""What a job of a sweep is told in its process on the cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from hydra_plugins.launch70b.slurm_launcher import SlurmLauncher, Submitit
from launcher import cli


@pytest.mark.parametrize(
    ("word", "restarts", "found"),
    [
        ("resume=True", "0", ["gpus=2", "resume=true"]),
        ("++resume=yes", "0", ["gpus=2", "resume=true"]),
        ("resume=False", "0", ["gpus=2"]),
        ("resume=False", "1", ["gpus=2", "resume=true"]),
    ],
)
def test_a_job_goes_on_where_it_is_told_or_restarted(
    word: str, restarts: str, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def run(self: object, overrides: Sequence[str], *rest: Any) -> None:
        seen.extend(overrides)

    monkeypatch.setattr(Submitit, "__call__", run, raising=False)
    monkeypatch.setattr(cli, "handle_signals", lambda: None)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    object.__new__(SlurmLauncher)(["gpus=2", word])
    assert seen == found
