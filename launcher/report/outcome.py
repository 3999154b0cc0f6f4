"""How a run ends, for people on stderr and for scripts on stdout: the last line there is always one JSON object."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from launcher.config import RunConfig
from launcher.failures import Failure
from launcher.report.console import print_failure
from launcher.report.report import failure_report

REPORT = "report.json"


def write_report(report: dict[str, Any], run_dir: Path) -> None:
    """The last line on stdout, and the same object as report.json.

    Raises:
        OSError: the file cannot be written; the line is out.
    """
    line = json.dumps(report)
    print(line, flush=True)
    store(run_dir, line)


def discard_report(run_dir: Path) -> None:
    """Removes that of an earlier run in this folder, which would pass for this one's if it were killed."""
    (run_dir / REPORT).unlink(missing_ok=True)


def store(run_dir: Path, line: str) -> None:
    """Writes report.json whole or not at all.

    Raises:
        OSError: with the file's name, which a full disk's own error lacks.
    """
    partial = run_dir / f"{REPORT}.partial"
    try:
        partial.write_text(line + "\n", encoding="utf-8")
        partial.replace(run_dir / REPORT)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(run_dir / REPORT)) from error


def report_failure(failure: Failure, run: RunConfig | None, run_dir: Path | None, exit_code: int = 1) -> int:
    """Says what failed and returns the exit code."""
    print_failure(failure)
    line = json.dumps(failure_report(failure, run, run_dir))
    # The folder may be what failed; the line on stdout says it all.
    with contextlib.suppress(OSError):
        if run_dir is not None:
            store(run_dir, line)
    print(line, flush=True)
    return exit_code
