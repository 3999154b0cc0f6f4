"""Scripts of tools.slurm on a real SLURM: a run, an array, scancel, requeue, and the end of the time limit."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.launcher.cli import LIMIT_SEC, SHORT, texts, wait_until
from tests.slurm.cluster import POLL_SEC, Cluster, hold_ranks, let_ranks_end

# More than a run gets done before it is ended; and few, but more than until its ranks are stopped.
MANY, SOME = 10000, 40
PROMPT = "import os\n"
ANSWERS = "outputs.jsonl"
# A model that needs cards, by facts: nothing of it is here.
LARGE = ("model=llama3_1_8b", "model.weights=dummy", "task=bench")


@dataclass(frozen=True)
class Submitted:
    """A job of its own folder, in which it was submitted."""

    job: str
    folder: Path
    cluster: Cluster

    @property
    def run_dir(self) -> Path:
        return self.folder / "slurm" / f"launch70b-{self.job}"

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("slurm-*.out")))

    def report(self, task: str = "") -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.run_dir / task / "report.json").read_text())
        return report

    def answers(self, task: str = "") -> list[dict[str, Any]]:
        return texts(self.run_dir / task / ANSWERS)

    def wait_for_answers(self) -> None:
        wait_until((self.run_dir / ANSWERS).exists, f"answers of job {self.job}: {self.log}")
        wait_until(lambda: b"\n" in (self.run_dir / ANSWERS).read_bytes(), f"an answer of job {self.job}")


def write_run(folder: Path, *arguments: str, num_prompts: int) -> Path:
    folder.mkdir()
    (folder / "prompts.txt").write_text(PROMPT * num_prompts)
    return write_script(folder, *SHORT, *arguments, "prompts_file=prompts.txt")


def write_script(folder: Path, *arguments: str) -> Path:
    command = [sys.executable, "-m", "tools.slurm", *arguments]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_SEC)
    assert made.returncode == 0, made.stderr
    (folder / "job.sbatch").write_text(made.stdout)
    return folder / "job.sbatch"


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Submitted]:
    """Submitted together, for they mostly wait. Each has come to an end that its test then looks at."""
    folder = tmp_path_factory.mktemp("scripts")
    # All are written before the first runs, which else might be done by then.
    scripts = [
        write_run(folder / "requeue", "gpus=1", num_prompts=SOME),
        write_run(folder / "limit", "gpus=1", "--time=5", "--signal-sec=55", num_prompts=MANY),
        write_run(folder / "cancel", "gpus=2", num_prompts=MANY),
        write_run(folder / "array", "gpus=1", "engine.prefix_cache=true,false", "--parallel=1", num_prompts=2),
    ]
    requeued, limited, cancelled, array = (Submitted(cluster.submit(each), each.parent, cluster) for each in scripts)
    # The shortest first, while there is something left to do.
    requeued.wait_for_answers()
    hold_ranks(requeued.run_dir)
    # Which lets those go on that were stopped.
    cluster.run("scontrol", "requeue", requeued.job)
    limited.wait_for_answers()
    Thread(target=let_ranks_end, args=[hold_ranks(limited.run_dir)], daemon=True).start()
    # Half a minute from now or more, of which the warning takes most. SLURM looks at limits twice a minute.
    minutes = 1 + round(cluster.elapsed_sec(limited.job) / 60)
    cluster.run("scontrol", "update", f"JobId={limited.job}", f"TimeLimit={minutes}")
    cancelled.wait_for_answers()
    cluster.run("scancel", cancelled.job)
    cluster.start_requeued(requeued.job)
    cluster.wait(cancelled.job, "CANCELLED")
    cluster.wait(array.job, "COMPLETED")
    return {"cancelled": cancelled, "requeued": requeued, "array": array, "limited": limited}


def test_slurm_understands_what_a_script_asks_for(cluster: Cluster, tmp_path: Path) -> None:
    """Cards, memory, cores, time and what the user added, of a job that is held back."""
    script = write_script(
        tmp_path, "gpus=1,2", *LARGE, "--mem=9", "--time=75", "--sbatch=--hold", "--sbatch=--comment=a b"
    )
    job = cluster.submit(script)
    asked = cluster.run("squeue", "--noheader", "--format=%b|%m|%C|%l|%k|%K", f"--jobs={job}").strip()
    cluster.run("scancel", job)
    assert asked == "gres:gpu:2|9G|8|1:15:00|a b|0-1"


def test_array_runs_a_task_for_each_value(jobs: dict[str, Submitted]) -> None:
    array = jobs["array"]
    reports = [array.report(task) for task in ("0", "1")]
    assert [(report["device"], report["prefix_cache"] is None) for report in reports] == [("cpu", False), ("cpu", True)]
    assert [len(array.answers(task)) for task in ("0", "1")] == [2, 2]
    assert array.log.count('{"task": "generate"') == 2


def test_cancelled_run_ends_in_order_keeps_its_answers_and_leaves_no_process(jobs: dict[str, Submitted]) -> None:
    cancelled = jobs["cancelled"]
    assert cancelled.cluster.job_processes(cancelled.job) == []
    assert 1 <= len(cancelled.answers()) < MANY
    assert cancelled.report()["error"]["message"] == "the run was ended by SIGTERM; every rank was stopped."
    assert not [line for line in cancelled.log.splitlines() if "Traceback" in line]


def test_requeued_run_answers_the_rest(jobs: dict[str, Submitted]) -> None:
    requeued = jobs["requeued"]
    requeued.cluster.wait(requeued.job, "COMPLETED")
    assert [answer["index"] for answer in requeued.answers()] == list(range(SOME))
    assert 1 <= len(requeued.report()["outputs"]) < SOME


def test_run_that_comes_to_its_time_limit_puts_itself_back_into_the_queue(jobs: dict[str, Submitted]) -> None:
    limited = jobs["limited"]
    wait_until(lambda: '"Interrupted"' in limited.log, "the end of the time limit")
    wait_until(lambda: limited.cluster.states(limited.job) == ["PENDING"], "a requeued job", poll_sec=POLL_SEC)
    assert 1 <= len(limited.answers()) < MANY
    assert "ended by SIGTERM" in limited.log
    limited.cluster.run("scancel", limited.job)
