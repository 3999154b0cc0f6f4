"""A run goes on where nobody listens, and says so; nothing that it opens takes the number of a closed stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.streams import lasting
from tests.launcher.cli import PYTHON, environment


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize(("make", "reason"), [(closed_pipe, "Broken pipe"), (full_disk, "No space left on device")])
def test_what_a_stream_does_not_take_is_dropped_and_the_reason_kept(make: object, reason: str) -> None:
    number = make()  # type: ignore[operator]
    stream, file = lasting(number, None, line_buffering=True)
    for _ in range(3):
        print("x" * 10**6, file=stream, flush=True)
    assert file.error is not None and file.error.strerror == reason
    stream.close()
    os.close(number)


def test_stream_that_takes_all_has_no_error(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as old:
        stream, file = lasting(old.fileno(), old, line_buffering=False)
        print("naïve", "x" * 10**5, file=stream, flush=True)
        assert file.error is None
    assert (tmp_path / "out").read_text() == f"na\\xefve {'x' * 10**5}\n"


def test_who_is_slow_to_read_from_what_does_not_block_gets_all() -> None:
    """As where another program has set a shared terminal so."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with ThreadPoolExecutor() as pool, os.fdopen(reader, "rb") as pipe:
        read = pool.submit(pipe.read)
        with os.fdopen(writer, "wb", buffering=0):
            stream, file = lasting(writer, None, line_buffering=True)
            print("x" * 10**6, file=stream, flush=True)
            stream.close()
        assert read.result(60) == b"x" * 10**6 + b"\n" and file.error is None


def plan(folder: Path, redirection: str) -> subprocess.CompletedProcess[str]:
    command = f'"$@" task=plan hydra.run.dir={folder / "run"} {redirection}'
    shell = ["bash", "-c", command, "bash", *PYTHON]
    return subprocess.run(shell, capture_output=True, text=True, cwd=folder, env=environment(), timeout=60, check=False)


def test_full_disk_behind_stdout_is_told_in_a_line_and_the_report_is_whole(tmp_path: Path) -> None:
    result = plan(tmp_path, ">/dev/full")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("stdout took no more (No space left on device)")
    assert json.loads((tmp_path / "run" / "report.json").read_text())["predicted"] is not None


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(tmp_path: Path, redirection: str) -> None:
    result = plan(tmp_path, redirection)
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["task"] == "plan"


STARTS_ANOTHER = """
import subprocess, sys
from launcher.streams import open_streams
open_streams()
sys.exit(subprocess.run([sys.executable, "-c", "import os; [os.fstat(number) for number in (0, 1, 2)]"]).returncode)
"""


def test_ranks_have_streams_where_those_of_their_parent_were_closed() -> None:
    shell = ["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, "-c", STARTS_ANOTHER]
    assert subprocess.run(shell, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(("unbuffered", "told"), [("1", b"said\n"), ("", b"")])
def test_what_is_printed_comes_at_once_where_python_is_told_so(unbuffered: str, told: bytes) -> None:
    code = "import os; from launcher.streams import open_streams; open_streams(); print('said'); os._exit(0)"
    env = environment({"PYTHONUNBUFFERED": unbuffered})
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, timeout=60, check=True)
    assert result.stdout == told


def test_argument_that_is_no_text_is_named(tmp_path: Path) -> None:
    command = [*map(os.fsencode, PYTHON), b"prompt=\xff", os.fsencode(f"hydra.run.dir={tmp_path / 'run'}")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=False)
    error = json.loads(result.stdout.splitlines()[-1])["error"]
    assert result.returncode == 1
    assert error["message"].startswith(r"'prompt=\udcff' is not text in UTF-8")
