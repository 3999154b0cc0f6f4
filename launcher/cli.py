"""The command line: Hydra composes, every failure becomes one sentence and one line of JSON, the exit code tells.

Hydra runs in one process per run. Where torchrun made this process one of several ranks, rank 0 composes and the
others wait for its job (launcher/torchrun.py).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from launcher import torchrun
from launcher.config import ConfigError, RunConfig, to_run_config
from launcher.failures import Failure, RunFailed, describe_exception
from launcher.outcome import report_failure, write_report
from launcher.override_errors import explain_composition, quoting_hint
from launcher.run import execute
from launcher.start import (
    FORWARDED_SIGNALS,
    SIGNAL_EXIT_CODE,
    StartRanks,
    ignore_signals,
    interrupted,
    start_ranks,
)


class JobFailed(Exception):
    """A job of a sweep failed and has said so; carries the exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"job failed with exit code {exit_code}")
        self.exit_code = exit_code


def main() -> int:
    """Runs the command line and returns the exit code."""
    ConfigStore.instance().store(group="schema", name="run", node=RunConfig)
    # Hydra then raises what it cannot compose instead of printing it, and we print it our way.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    handle_signals()
    try:
        run_hydra()
    except SystemExit as error:
        return int(error.code or 0)
    except JobFailed as error:
        return error.exit_code
    except RunFailed as error:
        return report_failure(error.failure, None, None, error.exit_code)
    except Exception as error:
        failure = describe_exception(error)
        if isinstance(error, hydra.errors.HydraException):
            message = explain_composition(error, sys.argv[1:])
            failure = Failure("ConfigError", message, quoting_hint(message))
        return report_failure(failure, None, None)
    return 0


@hydra.main(config_path="pkg://conf", config_name="config", version_base="1.3")
def run_hydra(config: DictConfig) -> None:
    """One job: the whole run, or one of a sweep. A sweep goes on after a job that failed."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    run: RunConfig | None = None
    try:
        run = to_run_config(config)
        report = execute(run, run_dir, choose_start(), torchrun.world_size())
    except RunFailed as error:
        end_job(report_failure(error.failure, run, run_dir, error.exit_code))
    except (ValueError, OSError) as error:
        end_job(report_failure(describe_exception(error), run, run_dir))
    else:
        write_report(report, run_dir)


def end_job(exit_code: int) -> NoReturn:
    """A single run ends here, and so does a sweep after a signal; otherwise it goes on and fails at its end."""
    if HydraConfig.get().mode == RunMode.MULTIRUN and exit_code < SIGNAL_EXIT_CODE:
        raise JobFailed(exit_code)
    sys.exit(exit_code)


def choose_start() -> StartRanks:
    """How this process gets its ranks.

    Raises:
        ConfigError: a sweep inside processes that torchrun already made ranks, or ranks that it cannot serve.
    """
    torchrun.check_environment()
    if not torchrun.is_rank():
        return start_ranks
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ConfigError("a sweep starts ranks for each of its jobs: use `torchrun -m launcher -m ...`, one process.")
    return torchrun.run_as_rank


def handle_signals() -> None:
    """Signals that end a run raise, so that it ends in order; the elastic agent replaces this while ranks run."""

    def stop(number: int, frame: object) -> NoReturn:
        ignore_signals()
        raise RunFailed(interrupted(number), SIGNAL_EXIT_CODE + number)

    for sig in FORWARDED_SIGNALS:
        signal.signal(sig, stop)
