"""Ranks from their start to their end, watched: what they say is shown, and what their cards do is measured."""

from __future__ import annotations

from pathlib import Path

from launcher.events import EventFollower
from launcher.hardware.inventory import Inventory
from launcher.job import Job, save_job
from launcher.processes.start import StartRanks, prepare_run_dir
from launcher.telemetry.sampler import Telemetry


def watch_ranks(job: Job, inventory: Inventory, start_ranks: StartRanks) -> Telemetry:
    """Runs the ranks of `job` to their end; what their cards did meanwhile.

    Raises:
        RunFailed: a rank failed or died, or a signal ended the run.
    """
    run_dir = Path(job.run_dir)
    watched = [rank if card is None else card for rank, card in enumerate(job.placement.cards)]
    # Processes may have by now the ids that ranks of an earlier run in this folder had: none is to be watched.
    prepare_run_dir(run_dir)
    with Telemetry(run_dir, inventory, watched) as telemetry, EventFollower(run_dir):
        start_ranks(job, save_job(job))
    return telemetry
