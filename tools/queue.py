"""A plain queue of runs on one machine: python -m tools.queue JOBS.txt [--busy wait|refuse]

Each line of JOBS.txt is a launcher's command line, as after `torchrun -m launcher`, and says gpus=N. Jobs start in the
order of the file, each as soon as N cards are free, and see only those (CUDA_VISIBLE_DEVICES): two jobs of two cards
run side by side on four. A card is free if no process computes on it and no other queue has it. Where others hold too
many, a job waits, or with --busy refuse is left out; either way the queue says whose process it is.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from launcher.amounts import count
from launcher.hardware.inventory import Card
from launcher.processes.start import catch_signals
from tools.cards import LOCK_FOLDER, CardLock, CardState, read_cards, take_cards

LAUNCHER = (sys.executable, "-m", "launcher")
BUSY = ("wait", "refuse")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A run needs seconds for its start anyway.
POLL_SEC = 2.0


@dataclass(frozen=True)
class Job:
    number: int
    arguments: tuple[str, ...]
    num_cards: int

    def __str__(self) -> str:
        return f"job {self.number} ({shlex.join(self.arguments)})"


@dataclass
class Running:
    job: Job
    process: subprocess.Popen[bytes]
    cards: list[tuple[Card, CardLock]]


@dataclass
class Queue:
    """Jobs that wait, run and have ended; `run` returns once all have ended."""

    waiting: list[Job]
    out: Path
    busy: str = "wait"
    locks: Path = LOCK_FOLDER
    launcher: Sequence[str] = LAUNCHER
    read_cards: Callable[[], Sequence[CardState]] = read_cards
    poll_sec: float = POLL_SEC
    running: list[Running] = field(default_factory=list)
    # Exit code of each job that ended, by number; None for those that were refused.
    exit_codes: dict[int, int | None] = field(default_factory=dict)
    last_words: str = ""
    # Of the signal that ends the queue.
    signal_number: int | None = None

    def run(self) -> int:
        """Runs every job; 0 where all of them ended with 0, above 128 after a signal."""
        while (self.waiting or self.running) and self.signal_number is None:
            self.end_finished()
            while self.waiting and self.signal_number is None and self.start_next():
                pass
            if self.waiting or self.running:
                time.sleep(self.poll_sec)
        if self.signal_number is not None:
            self.stop()
            return 128 + self.signal_number
        return int(any(code != 0 for code in self.exit_codes.values()))

    def start_next(self) -> bool:
        """Starts the first job that waits, or refuses it; False where it has to wait."""
        job = self.waiting[0]
        states = self.read_cards()
        ours = [card.uuid for running in self.running for card, _ in running.cards]
        cards, held = take_cards(job.num_cards, states, ours, self.locks)
        if cards:
            self.running.append(self.start(job, cards))
        elif self.busy == "refuse" and len(states) - len(held) < job.num_cards:
            self.say(f"{job} refused: " + " | ".join(held))
            self.exit_codes[job.number] = None
        else:
            self.say(f"{job} waits for {job.num_cards} of {len(states)} cards. " + " | ".join(held))
            return False
        self.waiting.pop(0)
        return True

    def start(self, job: Job, cards: list[tuple[Card, CardLock]]) -> Running:
        """The job's process, which inherits the locks: they outlast this one if it is killed."""
        visible = ",".join(card.uuid for card, _ in cards)
        self.out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            out, err = (stack.enter_context((self.out / f"{job.number}.{name}").open("wb")) for name in ("out", "err"))
            process = subprocess.Popen(
                [*self.launcher, *job.arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
                pass_fds=[lock.fd for _, lock in cards],
                # Signals of the terminal are for the queue, which passes them on.
                start_new_session=True,
            )
        self.say(f"{job} starts on cards {', '.join(str(card.index) for card, _ in cards)}; log: {err.name}")
        return Running(job, process, cards)

    def end_finished(self) -> None:
        for running in [each for each in self.running if each.process.poll() is not None]:
            for _, lock in running.cards:
                lock.release()
            self.running.remove(running)
            self.exit_codes[running.job.number] = running.process.returncode
            self.say(f"{running.job} ended with exit code {running.process.returncode}")

    def stop(self) -> None:
        """Ends the jobs that run, in order, and waits for them."""
        for running in self.running:
            running.process.terminate()
        for running in self.running:
            running.process.wait()

    def say(self, words: str) -> None:
        """A line on stderr, once as long as nothing changes."""
        if words != self.last_words:
            print(words, file=sys.stderr, flush=True)
        self.last_words = words


def read_jobs(text: str) -> list[Job]:
    """The jobs of a file; empty lines and comments (#) are left out.

    Raises:
        ValueError: a line does not say how many cards it takes, holds what is no setting, or a quote is open; or there
            is no job.
    """
    lines = [(number, split(number, line)) for number, line in enumerate(text.splitlines(), start=1)]
    found = [(number, arguments) for number, arguments in lines if arguments]
    if not found:
        raise ValueError("the file holds no job: write a launcher's command line a line, as gpus=2 model=NAME.")
    for number, words in found:
        check_words(number, words)
    return [Job(place, tuple(words), count_cards(number, words)) for place, (number, words) in enumerate(found)]


def split(number: int, line: str) -> list[str]:
    """The words of a line as a shell takes them."""
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise ValueError(f"line {number} cannot be read ({error}): {line}") from None


def check_words(line: int, words: Sequence[str]) -> None:
    """Raises ValueError: a word that the job, hours later perhaps, could make nothing of."""
    for word in words:
        if "=" not in word and not word.startswith(("-", "~")):
            what = "what comes after `torchrun -m launcher`, as gpus=2 model=NAME"
            raise ValueError(f"line {line}: {word} is no setting. Write {what}.")


def count_cards(line: int, arguments: Sequence[str]) -> int:
    """What gpus=N says; of a sweep over gpus, the most."""
    values = [argument.removeprefix("gpus=") for argument in arguments if re.fullmatch(r"gpus=\d+(,\d+)*", argument)]
    counts = [int(each) for value in values for each in value.split(",")]
    if not counts or min(counts) < 1:
        raise ValueError(f"line {line} must say gpus=N with N from 1: {shlex.join(arguments)}")
    return max(counts)


def check_cards(jobs: Sequence[Job], num_cards: int) -> None:
    """Raises:
    ValueError: a job takes more cards than there are.
    """
    for job in jobs:
        if job.num_cards > num_cards:
            raise ValueError(f"{job} takes {count(job.num_cards, 'card')}, but CUDA shows {num_cards} here.")


def claim(out: Path) -> None:
    """Makes the folder of a queue's logs.

    Raises:
        ValueError: it has those of another.
        OSError: it cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        # The first job's log, there from the start, tells two queues of one second apart, too.
        (out / "0.err").touch(exist_ok=False)
    except FileExistsError:
        raise ValueError(f"--out {out} has the logs of another queue. Name another folder.") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.queue", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--busy", choices=BUSY, default=BUSY[0], help="where others hold the cards (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for what jobs print (queue/DATE_TIME)")
    parser.add_argument("--locks", type=Path, default=LOCK_FOLDER, help="the same for all queues (%(default)s)")
    options = parser.parse_args(arguments)
    out = options.out or Path("queue") / time.strftime("%Y-%m-%d_%H-%M-%S")
    try:
        jobs = read_jobs(options.jobs.read_text(encoding="utf-8"))
        check_cards(jobs, len(read_cards()))
        # Not when the first job starts, hours later where others hold the cards.
        claim(out)
    except UnicodeDecodeError as error:
        parser.error(f"{options.jobs} is no text in UTF-8: {error}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    queue = Queue(jobs, out, options.busy, options.locks)

    def end(number: int, frame: object) -> None:
        # Only noted: a job that is just being started must not be lost.
        queue.signal_number = number

    catch_signals(SIGNALS, end)
    return queue.run()


if __name__ == "__main__":
    sys.exit(main())
