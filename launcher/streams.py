"""stdout and stderr that outlive their readers: a run goes on where nobody listens, and says so at its end.

A pager that was left, `| head`, a full disk or a terminal that went away must not end a run of hours; all that it has
to say is in its folder too.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import Any, TextIO

STANDARD = (0, 1, 2)


class LastingFile(io.FileIO):
    """A descriptor to write to; what it does not take is dropped, and `error` says why."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            # None: the pipe or terminal is full, and who shares it has set it not to block.
            while (num_bytes := super().write(data)) is None:
                select.select([], [self], [])
            return num_bytes
        except OSError as error:
            self.error = error
            return memoryview(data).nbytes


def open_streams() -> LastingFile:
    """Replaces sys.stdout and sys.stderr; returns what is below the first.

    Descriptors that were closed become /dev/null: the next file to be opened would take their number, and what is
    printed would go there.
    """
    for number in STANDARD:
        try:
            os.fstat(number)
        except OSError:
            # For the ranks, too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stderr, _ = lasting(2, sys.stderr, line_buffering=True)
    sys.stdout, file = lasting(1, sys.stdout, line_buffering=os.isatty(1) or is_unbuffered(sys.stdout))
    return file


def is_unbuffered(stream: TextIO | None) -> bool:
    """By PYTHONUNBUFFERED or python -u: what is printed comes at once."""
    return isinstance(stream, io.TextIOWrapper) and stream.write_through


def lasting(number: int, old: TextIO | None, *, line_buffering: bool) -> tuple[TextIO, LastingFile]:
    if old is not None:
        with contextlib.suppress(OSError):
            old.flush()
    file = LastingFile(number, "w", closefd=False)
    # An answer may hold what a terminal of another encoding cannot show.
    stream = io.TextIOWrapper(
        io.BufferedWriter(file), old.encoding if old else "utf-8", "backslashreplace", line_buffering=line_buffering
    )
    return stream, file
