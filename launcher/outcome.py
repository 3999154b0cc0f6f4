"""How a run ends, for people on stderr and for scripts on stdout: the last line there is always one JSON object."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from launcher.config import RunConfig
from launcher.console import print_failure
from launcher.failures import Failure
from launcher.report import failure_report


def write_report(report: dict[str, Any], run_dir: Path) -> None:
    """report.json, and the same object as the last line on stdout."""
    line = json.dumps(report)
    (run_dir / "report.json").write_text(line + "\n", encoding="utf-8")
    print(line, flush=True)


def report_failure(failure: Failure, run: RunConfig | None, run_dir: Path | None, exit_code: int = 1) -> int:
    """Says what failed and returns the exit code."""
    print_failure(failure)
    line = json.dumps(failure_report(failure, run, run_dir))
    # The folder may be what failed; the line on stdout says it all.
    with contextlib.suppress(OSError):
        if run_dir is not None:
            (run_dir / "report.json").write_text(line + "\n", encoding="utf-8")
    print(line, flush=True)
    return exit_code
