"""How a run ends, for people on stderr and for scripts on stdout: the last line there is always one JSON object."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from launcher.config import RunConfig
from launcher.failures import Failure
from launcher.finished import FINISHED_FILE
from launcher.report.accuracy import PAGE_FILE, POINTS_FILE
from launcher.report.console import print_failure, print_note
from launcher.report.report import failure_report
from launcher.report.speed_text import incomplete_text
from launcher.whole_file import write_whole

REPORT = "report.json"


def write_report(report: dict[str, Any], run_dir: Path) -> None:
    """The last line on stdout, and the same object as report.json.

    Raises:
        OSError: the file cannot be written; the line is out.
    """
    line = json.dumps(report)
    print(line, flush=True)
    write_whole(run_dir / REPORT, f"{line}\n")


def discard_report(run_dir: Path) -> None:
    """Removes that of an earlier run in this folder, which would pass for this one's if it were killed."""
    for name in (REPORT, FINISHED_FILE, POINTS_FILE, PAGE_FILE):
        (run_dir / name).unlink(missing_ok=True)


def report_failure(failure: Failure, run: RunConfig | None, run_dir: Path | None, exit_code: int = 1) -> int:
    """Says what failed and returns the exit code."""
    print_failure(failure)
    report = failure_report(failure, run, run_dir)
    if report["incomplete"] is not None:
        print_note(incomplete_text(report["incomplete"]))
    line = json.dumps(report)
    # The folder may be what failed; the line on stdout says it all.
    with contextlib.suppress(OSError):
        if run_dir is not None:
            write_whole(run_dir / REPORT, f"{line}\n")
    print(line, flush=True)
    return exit_code
