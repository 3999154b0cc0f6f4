"""What rank 0 says while it works, and the thread that shows it.

Rank 0 appends lines of JSON to events.jsonl; whoever owns the terminal follows the file. This works the same whether
the rank is a child process or this very process, and leaves a record of the run.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

EVENTS_FILE = "events.jsonl"
POLL_SEC = 0.05


class EventWriter:
    """Appends events to the run folder; ranks other than 0 say nothing."""

    def __init__(self, run_dir: Path, *, enabled: bool) -> None:
        self._file = (run_dir / EVENTS_FILE).open("a", encoding="utf-8") if enabled else None
        self._last_progress = ("", 0.0)

    def progress(self, stage: str, done: int, total: int, unit: str) -> None:
        """`done` of `total` `unit`s (bytes, tokens, prompts) of a stage; at most 20 a second, and the last one."""
        now = time.monotonic()
        stage_before, said_at = self._last_progress
        if done < total and stage == stage_before and now - said_at < POLL_SEC:
            return
        self._last_progress = (stage, now)
        self._write({"kind": "progress", "stage": stage, "done": done, "total": total, "unit": unit})

    def text(self, text: str) -> None:
        """A piece of the answer that is shown as it appears."""
        self._write({"kind": "text", "text": text})

    def _write(self, event: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(event, ensure_ascii=False) + "\n")
            self._file.flush()


class EventFollower:
    """Context manager: shows the events of a run folder, bars on stderr and answers on stdout, until left."""

    def __init__(self, run_dir: Path, *, stdout: TextIO | None = None, console: Console | None = None) -> None:
        self._path = run_dir / EVENTS_FILE
        # What an earlier run in this folder said is not said again.
        self._path.write_bytes(b"")
        self._stdout = stdout or sys.stdout
        self._console = console or Console(stderr=True)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="events", daemon=True)
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._wrote_text = False

    def __enter__(self) -> EventFollower:
        self._progress.start()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._progress.stop()
        if self._wrote_text:
            print(file=self._stdout, flush=True)

    def _follow(self) -> None:
        # Bytes, because the end of what is there so far may be half a character.
        with self._path.open("rb") as file:
            pending = b""
            while True:
                # Asked before the read, so that what was written before the stop is still shown.
                stopping = self._stop.is_set()
                pending += file.read()
                *lines, pending = pending.split(b"\n")
                for line in lines:
                    self._show(json.loads(line))
                if stopping:
                    return
                self._stop.wait(POLL_SEC)

    def _show(self, event: dict[str, Any]) -> None:
        shows: dict[str, Callable[..., None]] = {"progress": self._show_progress, "text": self._show_text}
        shows[event.pop("kind")](**event)

    def _show_progress(self, stage: str, done: int, total: int, unit: str) -> None:
        amount = f"{amount_text(done, unit)} of {amount_text(total, unit)}"
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(stage, total=total, amount=amount)
        self._progress.update(self._bars[stage], completed=done, total=total, amount=amount)

    def _show_text(self, text: str) -> None:
        if not self._wrote_text:
            # A live bar would redraw over the answer.
            self._progress.stop()
            self._wrote_text = True
        print(text, end="", file=self._stdout, flush=True)


def amount_text(amount: int, unit: str) -> str:
    """An amount as a person reads it: bytes in MB or GB, other units as they are."""
    if unit != "bytes":
        return f"{amount} {unit}"
    return f"{amount / 1e9:.2f} GB" if amount >= 1e9 else f"{amount / 1e6:.1f} MB"
