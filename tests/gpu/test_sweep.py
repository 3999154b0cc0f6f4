"""What only cards show of sweeps and queues: power over time, and two jobs at once, each on a card of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu.cards import needs_two_cards
from tests.launcher.cli import environment, run
from tools.cards import read_cards

pytestmark = [pytest.mark.gpu, needs_two_cards]


def test_bench_over_cards_and_batches_gives_every_plot(tmp_path: Path) -> None:
    bench = ("task=bench", "workload.prompt_tokens=128", "workload.output_tokens=64")
    result = run("-m", "gpus=1,2", "workload.batch_size=1,8", *bench, folder=tmp_path / "sweep", sweep=True)
    assert result.returncode == 0, result.stderr
    names = {path.name for path in (tmp_path / "sweep" / "plots").iterdir()}
    over_cards = ("tokens_per_sec_over_cards", "ttft_over_cards", "comm_share_over_cards")
    expected = (*over_cards, "memory", "throughput_against_latency", "power_over_time")
    assert names == {f"{name}.{suffix}" for name in expected for suffix in ("png", "svg")}
    for row in json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]:
        assert row["peak_gib"] > 0
        assert row["tokens_per_joule"] > 0


def test_queue_runs_two_jobs_at_once_on_cards_of_their_own(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.txt"
    jobs.write_text("".join(f"gpus=1 hydra.run.dir={tmp_path / str(place)}\n" for place in range(2)))
    command = [sys.executable, "-m", "tools.queue", str(jobs), "--out", str(tmp_path / "out")]
    command += ["--locks", str(tmp_path / "locks")]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    starts = [line for line in result.stderr.splitlines() if "starts on cards" in line]
    assert [line.partition("starts on cards ")[2][0] for line in starts[:2]] == ["0", "1"]
    reports = [json.loads((tmp_path / str(place) / "report.json").read_text()) for place in range(2)]
    cards = [report["inventory"]["cards"] for report in reports]
    assert [len(each) for each in cards] == [1, 1]
    assert cards[0][0]["uuid"] != cards[1][0]["uuid"]


def test_process_that_computes_on_a_card_is_named() -> None:
    program = "import sys, torch; torch.ones(1, device='cuda:1'); print('there', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], env=environment(), text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        time.sleep(0.5)
        holders = [state.holders for state in read_cards()]
        process.communicate("")
    assert len(holders[1]) >= 1
    # In a container the driver's numbers of processes may be those of the host.
    assert all(holder.startswith("process ") for holder in holders[1])
