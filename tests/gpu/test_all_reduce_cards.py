"""Every transport between cards, each rank a process of its own: right at every size, and after very many calls."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.cards import needs_two_cards

pytestmark = [pytest.mark.gpu, needs_two_cards]
ROOT = Path(__file__).parent.parent.parent


def run_tool(name: str, *args: str) -> str:
    """What it prints; it fails where a sum or a line is wrong."""
    command = [sys.executable, "-m", f"tools.bench.{name}", "--cards", str(min(4, torch.cuda.device_count())), *args]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_transport_sums_every_size() -> None:
    report = json.loads(run_tool("all_reduce", "--repeats", "3").splitlines()[-1])
    assert [row["bytes"] for row in report["all_reduce"]] == [1024 * 2**i for i in range(16)]
    at_256_kib = report["all_reduce"][8]["p50_us"]
    assert set(at_256_kib) == {"host_memory", "host_memory_dense", "host_memory_int8", "host_memory_two_step", "nccl"}
    assert all(time > 0 for row in report["all_reduce"] for time in row["p50_us"].values())
    assert [row["rows"] for row in report["norms"]] == [1, 2, 4, 8, 16, 32]
    assert all(set(row["us"]) == {"1", "2", "4", "8"} for row in report["norms"])


def test_no_element_of_many_calls_is_wrong() -> None:
    lines = run_tool("all_reduce", "--soak", "100000").splitlines()
    assert "wrong elements of each rank: [0, 0" in lines[-1]


def test_lines_of_16_bytes_come_whole() -> None:
    found = json.loads(run_tool("line_tears", "--seconds", "2").splitlines()[-1])
    assert not any(found["mixed"])
    # It has looked while lines were written, and not only before and after.
    assert all(new > 1_000_000 for new in found["new"])
