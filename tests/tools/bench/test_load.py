"""The load benchmark on the demo model: what it prints adds up."""

import json
import mmap
import re
import time
from pathlib import Path

import pytest

from parallel.checkpoint.headers import read_checkpoint
from tests.launcher.cli import wait_until
from tools.bench.load import main, process_memory, sampled_memory

DEMO = Path(__file__).parents[3] / "launcher" / "models" / "demo"
MIB = 2**20


def test_bytes_of_the_ranks_add_up_and_memory_follows_them(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(DEMO), "--ranks", "1", "2", "--cold"])
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    checkpoint = read_checkpoint(DEMO)
    norm_bytes = sum(entry.num_bytes for name, entry in checkpoint.tensors.items() if name.endswith("norm.weight"))
    for run, num_ranks in zip(result["runs"], (1, 2), strict=True):
        assert run["num_ranks"] == len(run["ranks"]) == num_ranks
        assert run["cold"]
        total = sum(load["bytes_read"] for load in run["ranks"])
        assert total == checkpoint.total_bytes + (num_ranks - 1) * norm_bytes
        for load in run["ranks"]:
            assert load["gb_per_sec"] == pytest.approx(load["bytes_read"] / load["sec"] / 1e9)
            assert 0 < load["disk_wait_sec"] + load["decode_sec"] < load["sec"]
            assert load["peak_anonymous_bytes"] >= load["anonymous_bytes"]
            # Small tensors may come from memory that the process already had.
            assert abs(load["anonymous_bytes"] - load["bytes_read"]) < load["bytes_read"] * 0.2 + 2 * MIB
    assert [re.findall(r"\d+", line)[:2] for line in table[1:]] == [["1", "0"], ["2", "0"], ["2", "1"]]


def test_sampled_peak_sees_memory_that_is_gone_again() -> None:
    before = process_memory()["RssAnon"]
    with sampled_memory() as peak:
        block = mmap.mmap(-1, 128 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for _ in range(128):
            block.write(b"x" * MIB)
        wait_until(lambda: peak["RssAnon"] - before > 120 * MIB, "a sample")
        block.close()
        # One more is taken after it.
        time.sleep(0.1)
    assert peak["RssAnon"] - before > 120 * MIB
    assert process_memory()["RssAnon"] - before < 20 * MIB
