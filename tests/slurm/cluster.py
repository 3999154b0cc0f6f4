"""A cluster of one machine: real munged, slurmctld and slurmd, with cards that are files, in a folder of their own."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from tests.launcher.cli import LIMIT_SEC, environment, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
NUM_CARDS = 4
# States that a job stays in.
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
# Far above what a request to an idle controller takes, or its start.
COMMAND_SEC = 90
# The controller answers within this, else a command fails; SLURM's own 10 s may be too short where cores are busy. Jobs
# are asked for long after their end: it forgets them after MinJobAge, 5 minutes if not said.
MESSAGE_SEC = 60
# SLURM gives this long between SIGTERM and SIGKILL; two ranks need about three seconds on two busy cores.
KILL_WAIT_SEC = 60
# Below those that Linux gives to whoever asks for any: such a one may be taken before a daemon listens on it.
PORTS = range(15000, 30000)
# Jobs need the cores more than questions about them do.
POLL_SEC = 0.3
RETRY_SEC = 3.0
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
GresTypes=gpu
JobRequeue=1
KillWait={kill_wait}
MessageTimeout={message_sec}
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=500000 Gres=gpu:{cards} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def can_start() -> bool:
    """Whether SLURM is installed and this user may start a node of it."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return os.geteuid() == 0 and all(shutil.which(program, path=path) for program in PROGRAMS)


@dataclass(frozen=True)
class Cluster:
    folder: Path
    env: dict[str, str]

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """A SLURM command's stdout; fails with what it said."""
        done = subprocess.run(
            command,
            env=self.env,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=COMMAND_SEC,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done
        return done.stdout

    def submit(self, script: Path) -> str:
        """Submits a script and returns the number of its job."""
        return self.run("sbatch", "--parsable", str(script), cwd=script.parent).strip()

    def states(self, job: str) -> list[str]:
        """Of each task of a job that the controller still knows, such as RUNNING."""
        return self.run("squeue", "--noheader", "--states=all", "--array", "--format=%T", f"--jobs={job}").split()

    def elapsed_sec(self, job: str) -> int:
        """How long a job of less than an hour has run."""
        minutes, seconds = self.run("squeue", "--noheader", "--format=%M", f"--jobs={job}").strip().split(":")
        return 60 * int(minutes) + int(seconds)

    def wait(self, job: str, *states: str, timeout_sec: float = LIMIT_SEC) -> None:
        """Returns when every task of a job is in one of these states."""

        def is_there() -> bool:
            found = set(self.states(job))
            assert not found & set(ENDS) - set(states), found
            return found <= set(states)

        wait_until(is_there, f"{states} of job {job}", timeout_sec, poll_sec=POLL_SEC)

    def start_requeued(self, job: str) -> None:
        """Waits for a job to have been requeued, and starts it without the two minutes that SLURM waits then."""
        next_try = 0.0

        def has_started() -> bool:
            nonlocal next_try
            found = self.run("scontrol", "show", "job", job)
            if "Restarts=0" in found or "JobState=PENDING" not in found:
                return "Restarts=0" not in found and "JobState=COMPLETING" not in found
            # While nodes are still cleaned up, a time that was set is set again by SLURM. In the second in which a node
            # ended a job it refuses to start it.
            if time.monotonic() > next_try:
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")
                next_try = time.monotonic() + RETRY_SEC
            return False

        wait_until(has_started, f"job {job} to start again", poll_sec=POLL_SEC)

    def processes(self) -> list[psutil.Process]:
        """What runs in this cluster's jobs, and its daemons."""
        return [each for each in psutil.process_iter() if environ(each).get("SLURM_CONF") == self.env["SLURM_CONF"]]

    def job_processes(self, job: str) -> list[psutil.Process]:
        return [each for each in self.processes() if environ(each).get("SLURM_JOB_ID") == job]


def hold_ranks(run_dir: Path) -> list[psutil.Process]:
    """Stops the ranks of a run, which else compute until what is to end them comes; see `let_ranks_end`."""
    ranks = [psutil.Process(int(file.read_text())) for file in (run_dir / "ranks").glob("*.pid")]
    for rank in ranks:
        rank.suspend()
    return ranks


def let_ranks_end(ranks: Iterable[psutil.Process]) -> None:
    """Waits until ranks that were stopped have been sent SIGTERM, or are gone, and lets them go on, and so end."""
    for rank in ranks:
        was_asked = partial(has_pending, rank, signal.SIGTERM)
        wait_until(was_asked, f"SIGTERM for {rank}", poll_sec=POLL_SEC)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.resume()


def has_pending(process: psutil.Process, sig: signal.Signals) -> bool:
    """Whether a signal waits for the process to go on; True for one that is gone."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True
    pending = int(re.search(r"^ShdPnd:\t(\w+)$", status, re.M)[1], 16)  # type: ignore[index]
    return bool(pending >> (sig - 1) & 1) or "T (stopped)" not in status


def environ(process: psutil.Process) -> dict[str, str]:
    try:
        return dict(process.environ())
    except (psutil.Error, OSError):
        return {}


@contextmanager
def started_cluster() -> Iterator[Cluster]:
    """Starts the daemons, waits for the node, and ends all of it, jobs included, whatever happens."""
    # Paths of sockets must be short, and munged wants folders that only root can write.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/run"))
    folder.chmod(0o755)
    env = environment({"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"})
    cluster = Cluster(folder, env)
    try:
        write_config(folder)
        start_daemons(cluster)
        yield cluster
    finally:
        end_all(cluster)
        shutil.rmtree(folder, ignore_errors=True)


def write_config(folder: Path) -> None:
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    (folder / "munge" / "key").touch(mode=0o600)
    (folder / "munge" / "key").write_bytes(os.urandom(1024))
    for card in range(NUM_CARDS):
        # SLURM takes devices only: these are /dev/null by other names.
        os.mknod(folder / f"card{card}", stat.S_IFCHR | 0o600, Path(os.devnull).stat().st_rdev)
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/card[0-{NUM_CARDS - 1}]\n")
    controller_port, node_port = free_ports()
    values = {"controller_port": controller_port, "node_port": node_port, "folder": folder, "cards": NUM_CARDS}
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(
        CONFIG.format(host=host, kill_wait=KILL_WAIT_SEC, message_sec=MESSAGE_SEC, **values)
    )


def free_ports() -> tuple[int, int]:
    """Two at random: other tests may start a cluster at the same time."""
    first, second, *_ = filter(is_free, random.SystemRandom().sample(PORTS, 100))
    return first, second


def is_free(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) != 0


def start_daemons(cluster: Cluster) -> None:
    munge = cluster.folder / "munge"
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    start(cluster, "munged", "--foreground", "--force", *(f"--{name}={munge / file}" for name, file in files.items()))
    wait_until((munge / "socket").exists, "munged", COMMAND_SEC)
    start(cluster, "slurmctld", "-D", "-c")
    start(cluster, "slurmd", "-D")

    def is_ready() -> bool:
        with suppress(AssertionError):
            return cluster.run("sinfo", "--noheader", "--format=%T").strip() == "idle"
        return False

    wait_until(is_ready, "an idle node", COMMAND_SEC, poll_sec=POLL_SEC)


def start(cluster: Cluster, *command: str) -> None:
    with (cluster.folder / f"{command[0]}.log").open("wb") as log:
        subprocess.Popen(
            command, env=cluster.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def end_all(cluster: Cluster) -> None:
    """Kills jobs before the daemons that would start others, until nothing is left."""
    end = time.monotonic() + COMMAND_SEC
    while (left := cluster.processes()) and time.monotonic() < end:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1)
