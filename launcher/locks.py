"""What only one run at a time may write to: its folder, and the file of its answers.

Locks are the kernel's, so that none outlives its process, however that ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from launcher.config import ConfigError

# As open() makes files: os.open would let them be run.
NEW_FILE = 0o666


class InUse(ConfigError):
    """A folder or file that another run, which goes on, writes to."""


@contextlib.contextmanager
def held(path: Path, knob: str, flags: int = os.O_RDONLY, value: Path | None = None) -> Iterator[None]:
    """Keeps `path`, a folder or a file, to this run.

    Args:
        knob: the key that chose it.
        value: of that key, where it is not `path`.

    Raises:
        InUse: another run has it.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, flags, NEW_FILE)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(
                f"{knob}={value or path} is in use by another run, which goes on. Wait for its end, or name another."
            ) from None
        except OSError:
            # Some network file systems have no locks.
            pass
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held_output(path: Path) -> Iterator[None]:
    """Keeps a file of answers to this run, and makes it where there is none; one that it has made is not left empty.

    A device or a pipe may have many writers.
    """
    if path.exists() and not path.is_file():
        yield
        return
    is_new = not path.exists()
    with held(path, "output_file", os.O_RDWR | os.O_CREAT):
        try:
            yield
        finally:
            if is_new and path.is_file() and path.stat().st_size == 0:
                # A link to it was there.
                path.resolve().unlink()
