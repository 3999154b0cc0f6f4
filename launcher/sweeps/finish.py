"""The end of a sweep: a table and plots over all of its jobs, and the exit code."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path

from launcher.amounts import count
from launcher.report.console import print_note, print_warning, stderr_console
from launcher.sweeps.announce import Sweep
from launcher.sweeps.jobs import SweepJob, find_finished, find_jobs
from launcher.sweeps.rows import OK, Row, sweep_rows, without_common_folders
from launcher.sweeps.table import NOTE, csv_text, markdown_text, num_left, reasons, terminal_table

TABLE_NAME = "sweep"
PLOTS_FOLDER = "plots"


def finish_sweep(sweep: Sweep, exit_code: int, *, interrupted: bool) -> int:
    """Writes table and plots, prints the table, and returns the exit code: 1 where a job failed and none was given.

    Args:
        interrupted: a signal ended the sweep, so time is short: no plots.

    Raises:
        OSError: the folder cannot be written.
    """
    jobs = find_jobs(sweep.folder, sweep.jobs, sweep.numbers)
    if all(job.folder is None for job in jobs):
        return exit_code
    if sweep.is_resumed:
        jobs = tuple(sorted((*jobs, *find_finished(sweep.folder, jobs)), key=lambda job: job.number))
    rows = sweep_rows(jobs)
    # Before files are written, for which a full disk has no room.
    stderr_console().print(terminal_table(without_common_folders(rows), count(len(rows), "job")))
    for line in (NOTE, *reasons(rows)):
        print_note(line)
    if num_left(rows):
        again = shlex.quote(f"resume={sweep.folder}")
        print_note(f"{num_left(rows)} of {len(rows)} jobs are left to do: -m {again}")
    write_tables(rows, sweep.folder)
    plots = [] if interrupted else draw_plots(jobs, rows, sweep.folder)
    print_note(f"sweep: {sweep.folder}/{TABLE_NAME}.csv, .json, .md" + (f", {PLOTS_FOLDER}/" if plots else ""))
    return exit_code or int(num_left(rows) > 0)


def write_tables(rows: Sequence[Row], folder: Path) -> None:
    texts = {
        "csv": csv_text(rows),
        "json": json.dumps({"jobs": list(rows)}, indent=1) + "\n",
        "md": markdown_text(rows, folder.name),
    }
    for suffix, text in texts.items():
        (folder / f"{TABLE_NAME}.{suffix}").write_text(text, encoding="utf-8")


def draw_plots(jobs: Sequence[SweepJob], rows: Sequence[Row], folder: Path) -> list[Path]:
    """Plots of what the jobs have in common; trouble with them does not make a failure of a sweep that went well."""
    if all(row["status"] != OK for row in rows):
        return []
    try:
        # A second, and only a sweep needs it.
        from launcher.sweeps.plots import write_plots

        with warnings.catch_warnings(record=True) as caught:
            plots = write_plots(jobs, rows, folder / PLOTS_FOLDER)
        if caught:
            print_warning(f"plots: {caught[0].message}")
        return plots
    except Exception as error:
        print_warning(f"no plots: {type(error).__name__}: {error}")
        return []
