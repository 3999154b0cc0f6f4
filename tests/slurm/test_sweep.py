"""A sweep by hydra/launcher=slurm on a real SLURM: two jobs of which one is requeued, and one that is interrupted."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.cli import SHORT, Result, Running, started, texts, wait_until
from tests.slurm.cluster import Cluster, hold_ranks, let_ranks_end

# More than a run gets done before it is ended; and few, but more than until its ranks are stopped.
MANY, SOME = 10000, 40
SHARED = "engine.prefix_cache"
SLURM = ("-m", "hydra/launcher=slurm", *SHORT)


@dataclass(frozen=True)
class Sweep:
    result: Result
    folder: Path
    # Numbers in SLURM of job 0 and on.
    names: list[str]

    def answers(self, job: int) -> list[int]:
        return [answer["index"] for answer in texts(self.folder / str(job) / "outputs.jsonl")]


@pytest.fixture(scope="module")
def running(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Running]]:
    """One of two jobs, and one of a job that takes too long."""
    folder = tmp_path_factory.mktemp("sweep")
    env = {name: cluster.env[name] for name in ("SLURM_CONF", "PATH")}
    with ExitStack() as stack:
        found = []
        for name, swept, num_prompts in (("whole", f"{SHARED}=true,false", SOME), ("ended", "gpus=2", MANY)):
            prompts = folder / f"{name}.txt"
            prompts.write_text("import os\n" * num_prompts)
            words = (*SLURM, swept, f"prompts_file={prompts}", "hydra.launcher.mem_gb=3")
            found.append(stack.enter_context(started(*words, folder=folder / name, env=env, sweep=True)))
        yield found[0], found[1]


@pytest.fixture(scope="module")
def told(cluster: Cluster, running: tuple[Running, Running]) -> list[str]:
    """The jobs of the sweep of two; job 0 was told that its time is up, as SLURM does a minute before."""
    sweep, _ = running
    sweep.wait_for("0/outputs.jsonl", "\n")
    found = names(sweep, 2)
    ranks = hold_ranks(sweep.folder / "0")
    cluster.run("scancel", "--signal=TERM", found[0])
    let_ranks_end(ranks)
    return found


@pytest.fixture(scope="module")
def memory(cluster: Cluster, running: tuple[Running, Running], told: list[str]) -> str:
    """What SLURM was asked for, by squeue, of a job that runs."""
    (name,) = names(running[1], 1)
    return cluster.run("squeue", "--noheader", "--format=%m %C %b", f"--jobs={name}").strip()


@pytest.fixture(scope="module")
def ended(cluster: Cluster, running: tuple[Running, Running], memory: str) -> Sweep:
    """The sweep that a signal ended, once its job had written answers."""
    _, sweep = running
    sweep.wait_for("0/outputs.jsonl", "\n")
    sweep.process.send_signal(signal.SIGTERM)
    return Sweep(sweep.finish(), sweep.folder, names(sweep, 1))


@pytest.fixture(scope="module")
def whole(cluster: Cluster, running: tuple[Running, Running], told: list[str], ended: Sweep) -> Sweep:
    """The sweep of two jobs, the first of which came back from the queue."""
    sweep, _ = running
    cluster.start_requeued(told[0])
    return Sweep(sweep.finish(), sweep.folder, told)


def names(running: Running, num: int) -> list[str]:
    def found() -> list[str]:
        lines = re.findall(r"^job (\d+) .*SLURM job ([\d_]+), ", running.output("stderr"), re.M)
        return [name for _, name in sorted(lines)]

    wait_until(lambda: len(found()) == num, f"{num} jobs")
    return found()


def test_job_asks_for_what_its_plan_needs(memory: str) -> None:
    """Memory as it was set, cores for two ranks; ranks on the CPU take no cards."""
    assert memory == "3G 8 N/A"


def test_interrupted_sweep_ends_its_job_in_order_and_leaves_no_process(cluster: Cluster, ended: Sweep) -> None:
    assert ended.result.returncode == 128 + signal.SIGTERM, ended.result
    assert cluster.states(ended.names[0]) == ["CANCELLED"]
    assert cluster.job_processes(ended.names[0]) == []
    reports = ended.result.reports
    assert reports[0]["error"]["message"] == "the run was ended by SIGTERM; every rank was stopped."
    assert 1 <= len(ended.answers(0)) < MANY
    assert (ended.folder / "sweep.csv").exists()


def reports_of(sweep: Sweep) -> list[dict[str, Any]]:
    """Of its two jobs, in their order."""
    return sorted(sweep.result.reports, key=lambda report: int(Path(report["run_dir"]).name))


def test_every_job_of_a_sweep_runs_and_reports(whole: Sweep) -> None:
    assert whole.result.returncode == 0, whole.result
    assert [report.get("error") for report in reports_of(whole)] == [None, None]
    assert [report["prefix_cache"] is None for report in reports_of(whole)] == [False, True]
    assert "2 jobs" in whole.result.stderr


def test_job_at_its_time_limit_goes_back_into_the_queue_and_does_what_is_missing(whole: Sweep) -> None:
    assert [whole.answers(job) for job in (0, 1)] == [list(range(SOME))] * 2
    requeued, other = reports_of(whole)
    assert 1 <= len(requeued["outputs"]) < SOME == len(other["outputs"])
