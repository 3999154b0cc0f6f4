"""What ranks say while they work, and the thread that shows it.

Rank 0 appends lines of JSON to events.jsonl, and the others how far they have come where each works for itself; whoever
owns the terminal follows the file. This works the same whether the rank is a child process or this very process, and
leaves a record of the run.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from launcher.progress import Stage

EVENTS_FILE = "events.jsonl"
POLL_SEC = 0.05
# Between lines about a stage where there is no terminal to draw a bar on.
PLAIN_SEC = 10.0


class EventWriter:
    """Appends events to the run folder: rank 0 all of them, the others the progress of `each_rank` stages.

    A line is one write to the end of the file, so that those of several ranks do not mix.
    """

    def __init__(self, run_dir: Path, *, rank: int) -> None:
        self._rank = rank
        self._path = run_dir / EVENTS_FILE
        self._file: TextIO | None = None
        self._last_progress = ("", 0.0)

    def progress(self, stage: str, done: int, total: int, unit: str, *, each_rank: bool = False) -> None:
        """`done` of `total` `unit`s (bytes, tokens, prompts) of a stage; at most 20 a second, and the last one.

        Args:
            each_rank: the amounts are this rank's own, and every rank tells its own.
        """
        if self._rank != 0 and not each_rank:
            return
        now = time.monotonic()
        stage_before, said_at = self._last_progress
        if done < total and stage == stage_before and now - said_at < POLL_SEC:
            return
        self._last_progress = (stage, now)
        amounts = {"stage": stage, "done": done, "total": total, "unit": unit}
        self._write({"kind": "progress", **amounts, "rank": self._rank})

    def text(self, text: str) -> None:
        """A piece of the answer that is shown as it appears."""
        if self._rank == 0:
            self._write({"kind": "text", "text": text})

    def _write(self, event: dict[str, Any]) -> None:
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
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
        self._stages: defaultdict[str, Stage] = defaultdict(Stage)
        self._last_line_sec = time.monotonic()
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

    def _show_progress(self, stage: str, done: int, total: int, unit: str, rank: int) -> None:
        """The bar is the slowest rank's."""
        now = time.monotonic()
        self._stages[stage].update(rank, done, total, now)
        _, slowest = self._stages[stage].slowest()
        amount = self._stages[stage].text(unit)
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(stage, total=slowest.total, amount=amount)
        self._progress.update(self._bars[stage], completed=slowest.done, total=slowest.total, amount=amount)
        # Without a terminal the bar appears once, when all is over.
        if not self._console.is_terminal and now - self._last_line_sec >= PLAIN_SEC:
            self._last_line_sec = now
            self._console.print(f"{stage} {amount}", highlight=False)

    def _show_text(self, text: str) -> None:
        if not self._wrote_text:
            # A live bar would redraw over the answer.
            self._progress.stop()
            self._wrote_text = True
        print(text, end="", file=self._stdout, flush=True)
