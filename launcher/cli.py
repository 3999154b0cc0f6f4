"""The command line: Hydra composes, every failure becomes one sentence and one line of JSON, the exit code tells.

Hydra runs in one process per run. Where torchrun made this process one of several ranks, rank 0 composes and the
others wait for its job (launcher/processes/torchrun.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from launcher.config import ConfigError, RunConfig, to_run_config
from launcher.failures import Failure, RunFailed, describe_exception
from launcher.locks import InUse, held
from launcher.override_errors import composition_hint, explain_composition
from launcher.processes import torchrun
from launcher.processes.start import (
    FORWARDED_SIGNALS,
    SIGNAL_EXIT_CODE,
    StartRanks,
    catch_signals,
    ignore_signals,
    interrupted,
    start_ranks,
)
from launcher.report.console import print_note
from launcher.report.outcome import discard_report, report_failure, write_report
from launcher.run import execute
from launcher.sweeps.announce import Announce
from launcher.sweeps.finish import finish_sweep
from launcher.sweeps.resume import MULTIRUN_FLAGS, finished_report, goes_on, resume_arguments


def main() -> int:
    """Runs the command line and returns the exit code."""
    exit_code = run_command_line()
    if Announce.sweep is None:
        return exit_code
    try:
        return finish_sweep(Announce.sweep, exit_code, interrupted=exit_code >= SIGNAL_EXIT_CODE)
    except RunFailed as error:
        return report_failure(error.failure, None, None, error.exit_code)
    except OSError as error:
        return report_failure(describe_exception(error), None, None, exit_code or 1)


def run_command_line() -> int:
    """Runs the job, or all jobs of a sweep; of those that failed, a sweep's exit code says nothing yet."""
    ConfigStore.instance().store(group="schema", name="run", node=RunConfig)
    # Hydra then raises what it cannot compose instead of printing it, and we print it our way.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    handle_signals()
    try:
        check_text(sys.argv[1:])
        sys.argv[1:] = flag_first(resume_arguments(sys.argv[1:]))
        run_hydra()
    except SystemExit as error:
        return int(error.code or 0)
    except RunFailed as error:
        return report_failure(error.failure, None, None, error.exit_code)
    except Exception as error:
        failure = describe_exception(error)
        if isinstance(error, hydra.errors.HydraException):
            if Announce.sweep is not None:
                Announce.sweep.restore_command()
            message = explain_composition(error, sys.argv[1:])
            failure = Failure("ConfigError", message, composition_hint(message))
        return report_failure(failure, None, None)
    return 0


def flag_first(arguments: Sequence[str]) -> list[str]:
    """With -m at the beginning: what follows one in the middle is unknown to argparse, which Hydra parses by."""
    return sorted(arguments, key=lambda argument: argument not in MULTIRUN_FLAGS)


def check_text(arguments: Sequence[str]) -> None:
    """Raises ConfigError: bytes that are no text, as from a terminal of another encoding; no file could hold them."""
    for each in arguments:
        try:
            each.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{each!r} is not text in UTF-8. Set a locale that is (LC_ALL=C.UTF-8), or use prompts_file=FILE."
            ) from None


@hydra.main(config_path="pkg://conf", config_name="config", version_base="1.3")
def run_hydra(config: DictConfig) -> None:
    """One job: the whole run, or one of a sweep. A sweep goes on after a job that failed."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    try:
        with held(run_dir, "hydra.sweep.dir" if is_sweep() else "hydra.run.dir"):
            run_job(config, run_dir)
    except RunFailed as error:
        end_job(report_failure(error.failure, None, None, error.exit_code))
    except (InUse, OSError) as error:
        # What is in the folder is another run's, or nothing can be written there.
        end_job(report_failure(describe_exception(error), None, None))


def run_job(config: DictConfig, run_dir: Path) -> None:
    """A job in a folder of its own, to its report, whatever it ends with."""
    run: RunConfig | None = None
    try:
        run, report = resume_job(config, run_dir) if is_sweep() else (to_run_config(config), None)
        if report is None:
            discard_report(run_dir)
            report = execute(run, run_dir, choose_start(), torchrun.world_size())
    except RunFailed as error:
        end_job(report_failure(error.failure, run, run_dir, error.exit_code))
    except Exception as error:
        end_job(report_failure(describe_exception(error), run, run_dir))
    else:
        write_report(report, run_dir)


def is_sweep() -> bool:
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def resume_job(config: DictConfig, run_dir: Path) -> tuple[RunConfig, dict[str, Any] | None]:
    """A job of a sweep, and its report where resume=true finds it done.

    resume=true means the sweep here; in the job itself it means the answers that were written before it was cut short.

    Raises:
        ConfigError: values that cannot be run.
    """
    is_resumed, config.resume = bool(config.resume), False
    run = to_run_config(config)
    if not is_resumed:
        return run, None
    report = finished_report(run, run_dir)
    if report is not None:
        print_note(f"done already: {run_dir}")
    return goes_on(run, run_dir), report


def end_job(exit_code: int) -> None:
    """A single run ends here, and so does a sweep after a signal; otherwise it goes on and fails at its end."""
    if not is_sweep() or exit_code >= SIGNAL_EXIT_CODE:
        sys.exit(exit_code)


def choose_start() -> StartRanks:
    """How this process gets its ranks.

    Raises:
        ConfigError: a sweep inside processes that torchrun already made ranks, or ranks that it cannot serve.
    """
    torchrun.check_environment()
    if not torchrun.is_rank():
        return start_ranks
    if is_sweep():
        raise ConfigError("a sweep starts ranks for each of its jobs: use `torchrun -m launcher -m ...`, one process.")
    return torchrun.run_as_rank


def handle_signals() -> None:
    """Signals that end a run raise, so that it ends in order, the ranks first."""

    def stop(number: int, frame: object) -> NoReturn:
        ignore_signals()
        raise RunFailed(interrupted(number), SIGNAL_EXIT_CODE + number)

    catch_signals(FORWARDED_SIGNALS, stop)
