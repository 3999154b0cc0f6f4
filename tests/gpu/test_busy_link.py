"""Copies beside a command take part of the link from it, and leave the rest."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

PLAIN_COPY = (
    "import torch; from launcher.tasks.copy_rates import pinned_copy_bandwidth; "
    "print(pinned_copy_bandwidth(torch.device('cuda')) / 1e9)"
)


def output_of(*command: str) -> list[str]:
    return subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout.split("\n")


def test_a_command_gets_about_half_of_the_link() -> None:
    alone = float(output_of("-c", PLAIN_COPY)[0])
    left, told, _ = output_of("-m", "tools.busy_link", "--", sys.executable, "-c", PLAIN_COPY)
    assert json.loads(told)["alone_gb_per_sec"] == pytest.approx(alone, rel=0.1)
    assert 0.35 * alone < float(left) < 0.65 * alone
