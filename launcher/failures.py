"""Failures as people and scripts need them: what happened, and what to change.

The first rank that fails writes error.json in the run folder; ranks that fail after it, because their peer is gone,
leave it alone. So the parent reports the cause and not one of its consequences.
"""

from __future__ import annotations

import contextlib
import errno
import json
from dataclasses import asdict, dataclass
from pathlib import Path

ERROR_FILE = "error.json"
FOLDER_KNOBS = "hydra.run.dir=FOLDER, of a sweep hydra.sweep.dir=FOLDER"
FULL_DISK_HINT = f"Free some space, or write elsewhere: output_file=FILE, {FOLDER_KNOBS}."


@dataclass(frozen=True)
class Failure:
    """`type` is the exception's name, `hint` what the user can do about it (may be empty)."""

    type: str
    message: str
    hint: str = ""
    rank: int | None = None
    log: str | None = None


class RunFailed(BaseException):
    """A run that ended without its result; carries the failure and the exit code.

    No Exception: it comes from handlers of signals, too, and libraries make errors of their own of every Exception.
    """

    def __init__(self, failure: Failure, exit_code: int = 1) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.exit_code = exit_code


def describe_exception(error: BaseException, rank: int | None = None, log: str | None = None) -> Failure:
    """The failure behind an exception, with a hint where the cause is one that users meet."""
    return Failure(type(error).__name__, str(error) or repr(error), find_hint(error), rank, log)


def find_hint(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return FULL_DISK_HINT
    if isinstance(error, OSError) and error.errno in (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EEXIST,
    ):
        return f"Choose a folder that can be written: {FOLDER_KNOBS}."
    if is_out_of_memory(error):
        return "Use more cards (gpus), a smaller engine.max_context or workload.batch_size, or fewer bits."
    if is_timeout(error):
        return "A rank waited too long for another: see the logs of all; timeouts.collective_sec=SECONDS allows more."
    if is_lost_connection(error):
        return "Another rank ended first; its log says why."
    if type(error).__name__ in ("DistBackendError", "DistNetworkError"):
        return "Check the links with task=probe; limits.peer_access=off avoids broken peer access."
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Torch's error on a card, its error on the host, Python's own, and the system's (a file that cannot be mapped)."""
    known = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    texts = ("can't allocate memory", "Cannot allocate memory")
    return known or any(text in str(error) for text in texts)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a peer ended in the middle of a collective: then the cause is with the peer."""
    return any(f"Connection {end} by peer" in str(error) for end in ("closed", "reset"))


def is_timeout(error: BaseException) -> bool:
    """Whether a peer did not come to a collective, or to the process group, in time; gloo's words and torch's."""
    texts = ("Timed out waiting", "socket has timed out after", "wait timeout after")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def write_first_failure(run_dir: Path, failure: Failure) -> bool:
    """Records `failure` if none is recorded yet; tells whether it was the first."""
    with contextlib.suppress(OSError):
        with (run_dir / ERROR_FILE).open("x", encoding="utf-8") as file:
            json.dump(asdict(failure), file)
        return True
    return False


def read_first_failure(run_dir: Path) -> Failure | None:
    path = run_dir / ERROR_FILE
    try:
        return Failure(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
