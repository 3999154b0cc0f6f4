"""What a run has measured before its end: kept as it goes, so that one which is ended still reports it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.whole_file import write_whole

FINISHED_FILE = "finished.json"


def keep_finished(run_dir: Path, measured: dict[str, Any]) -> None:
    """Keeps `measured` in place of what was kept before.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(run_dir / FINISHED_FILE, json.dumps(measured))


def read_finished(run_dir: Path) -> dict[str, Any] | None:
    """None where nothing was kept."""
    try:
        measured: dict[str, Any] = json.loads((run_dir / FINISHED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return measured
