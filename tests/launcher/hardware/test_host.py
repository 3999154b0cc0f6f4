"""The peak of a process's host memory, against memory that it takes and gives back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.hardware import host

TAKEN_BYTES = 300 * 2**20
# Its parent has more than this process ever has.
SCRIPT = f"""
import mmap
from launcher.hardware import host
before = host.peak_bytes()
pages = mmap.mmap(-1, {TAKEN_BYTES})
pages.write(bytes(1) * {TAKEN_BYTES // 2})
pages.close()
print(before, host.peak_bytes())
"""


def test_peak_keeps_what_was_given_back_and_leaves_out_the_parent() -> None:
    held = b"x" * 2 * TAKEN_BYTES
    output = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    before, after = map(int, output.split())
    assert 2**20 < before < len(held) / 2
    # The bytes that are written, and their pages.
    assert TAKEN_BYTES - 2**24 < after - before < TAKEN_BYTES + 2**24


def test_peak_is_unknown_where_the_kernel_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "STATUS_OF_PROCESS", tmp_path / "status")
    assert host.peak_bytes() is None
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t 12 kB\n")
    assert host.peak_bytes() is None
