"""hydra/launcher=slurm: each job of a sweep becomes a job of SLURM, through hydra-submitit-launcher.

It is here because Hydra looks for plugins nowhere else. Jobs with equal needs form an array; this process waits for all
of them as it would for jobs of its own, and a signal that ends it ends them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, open_dict, read_write

from launcher.config import ConfigError, RunConfig, to_run_config

try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as Submitit
except ImportError:

    class Submitit(Launcher):
        """In its place where it is not installed."""

        def __init__(self, **params: Any) -> None:
            """Hydra would wrap what is raised here."""

        def setup(self, **parts: Any) -> None:
            raise ConfigError("hydra/launcher=slurm needs hydra-submitit-launcher: pip install 'launch70b[slurm]'.")


# Of hydra.launcher, what goes to sbatch as it is.
PASSED_ON = (
    "partition", "qos", "account", "constraint", "exclude", "comment", "setup", "array_parallelism", "stderr_to_stdout",
)  # fmt: skip


class SlurmLauncher(Submitit):
    """`params` are those of conf/hydra/launcher/slurm.yaml."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Submits the jobs and returns when all have ended.

        Raises:
            RunFailed: a signal ended this process; the jobs were cancelled.
        """
        from launcher.slurm.request import request_of
        from launcher.slurm.wait import Waiting

        arrays = defaultdict(list)
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            config = self.job_config(overrides, number)
            run = read_run(config)
            arrays[request_of(run, self.params)].append((number, list(overrides), config, run))
        jobs = [job for request, tasks in arrays.items() for job in self.submit(request, tasks)]
        Waiting(jobs).wait()
        return [JobReturn(overrides=list(each), status=JobStatus.COMPLETED) for each in job_overrides]

    def job_config(self, overrides: Sequence[str], number: int) -> DictConfig:
        """The config that the job will have, as far as it is known before SLURM gives it a name."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with read_write(config), open_dict(config):
            config.hydra.job.num = number
            config.hydra.job.id = str(number)
            folder = Path(config.hydra.sweep.dir) / str(config.hydra.sweep.subdir)
            config.hydra.runtime.output_dir = str(folder.absolute())
        return config

    def submit(self, request: Any, tasks: Sequence[Any]) -> list[Any]:
        """An array of jobs, or one job, and what to know of each while it runs."""
        import submitit

        from launcher.report.console import print_note
        from launcher.slurm.wait import SlurmJob

        executor = submitit.SlurmExecutor(folder=self.params["submitit_folder"], max_num_timeout=0)
        executor.update_parameters(**self.sbatch_parameters(request))
        state = Singleton.get_state()
        calls = [(overrides, "hydra.sweep.dir", number, str(number), state) for number, overrides, _, _ in tasks]
        found = executor.map_array(self, *zip(*calls, strict=True))
        jobs = [
            SlurmJob(number, each.job_id, run, Path(config.hydra.runtime.output_dir), each.paths.stderr)
            for each, (number, _, config, run) in zip(found, tasks, strict=True)
        ]
        for job, (_, overrides, _, _) in zip(jobs, tasks, strict=True):
            print_note(f"job {job.number} ({' '.join(overrides)}): SLURM job {job.name}, {request}")
        return jobs

    def sbatch_parameters(self, request: Any) -> dict[str, Any]:
        """submitit's, for a request. SIGTERM reaches the run itself: submitit's own signal has no meaning for it."""
        params = self.params
        cards = {"gres": params["gres"] or f"gpu:{request.num_cards}"} if request.num_cards else {}
        return {
            "job_name": params["name"],
            "time": request.minutes,
            "nodes": 1,
            "ntasks_per_node": 1,
            "cpus_per_task": request.num_cores,
            "mem": f"{math.ceil(request.memory_gib * 1024)}M",
            # srun does not take this from sbatch.
            "srun_args": [f"--cpus-per-task={request.num_cores}"],
            "additional_parameters": {
                "signal": f"TERM@{params['signal_delay_s']}",
                "requeue": True,
                **params["additional_parameters"],
            },
            **cards,
            **{name: params[name] for name in PASSED_ON if params[name] is not None},
        }

    def __call__(self, sweep_overrides: list[str], *args: Any) -> JobReturn:
        """The job itself, in a process of its own on the cluster. A restarted one goes on from its answers."""
        from launcher.cli import handle_signals
        from launcher.failures import RunFailed
        from launcher.processes.start import SIGNAL_EXIT_CODE, end_process
        from launcher.slurm.commands import num_restarts, requeue_if_out_of_time
        from launcher.sweeps.jobs import without_resume
        from launcher.sweeps.resume import goes_on_with

        # In place of submitit's, which ignores SIGTERM.
        handle_signals()
        overrides = list(without_resume(sweep_overrides))
        if num_restarts() or goes_on_with(sweep_overrides):
            overrides.append("resume=true")
        try:
            return super().__call__(overrides, *args)
        except (SystemExit, RunFailed) as error:
            # Only a signal ends a job of a sweep so.
            if self.is_resumable(overrides):
                requeue_if_out_of_time(self.params["max_num_timeout"])
            end_process(error.code if isinstance(error, SystemExit) else SIGNAL_EXIT_CODE)

    def is_resumable(self, overrides: Sequence[str]) -> bool:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        return config.prompts_file is not None


def read_run(config: DictConfig) -> RunConfig | None:
    """The run of a job; None where its values are no run, which the job itself reports."""
    singleton = HydraConfig.instance()
    before = singleton.cfg
    singleton.set_config(config)
    try:
        plain = config.copy()
        with read_write(plain), open_dict(plain):
            del plain["hydra"]
            # Of a sweep, here: see launcher/sweeps/resume.py.
            plain.resume = False
        return to_run_config(plain)
    except Exception:
        return None
    finally:
        singleton.cfg = before
