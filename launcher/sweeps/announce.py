"""Which sweep this process runs: Hydra tells a callback before the first job, and nobody after a job that failed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from launcher.config import ConfigError
from launcher.failures import describe_exception
from launcher.locks import InUse, held
from launcher.report.outcome import report_failure
from launcher.sweeps.folders import check_folders
from launcher.sweeps.jobs import number_jobs
from launcher.sweeps.resume import COMMAND_FILE, PLACES, SUBDIR, goes_on_with

# As conf/config.yaml has it.
SUBDIR_BY_NUMBER = "${hydra.job.num}"
# The lock of this process's sweep.
HELD = ExitStack()


@dataclass(frozen=True)
class Sweep:
    """`jobs` holds the overrides of each job, in order; None where a sweeper decides them as it goes.

    `command` is what the folder's COMMAND_FILE held before, of which Hydra makes that of this sweep. `numbers`: those
    that the jobs' folders have for names; None where they have others.
    """

    folder: Path
    jobs: tuple[tuple[str, ...], ...] | None
    command: bytes | None = None
    numbers: tuple[int, ...] | None = None

    @property
    def is_resumed(self) -> bool:
        return any(map(goes_on_with, self.jobs or ()))

    def restore_command(self) -> None:
        """For a sweep whose values cannot be composed: `resume` must not find them in the folder."""
        if self.command is not None:
            (self.folder / COMMAND_FILE).write_bytes(self.command)


class Announce(Callback):
    """Configured in conf/config.yaml; `sweep` is None until a sweep starts."""

    sweep: ClassVar[Sweep | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir).absolute()
        file = folder / COMMAND_FILE
        sweep = Sweep(folder, expand_jobs(config), file.read_bytes() if file.is_file() else None)
        has_names = subdir_as_typed(config) != SUBDIR_BY_NUMBER
        if has_names:
            refuse_shared_folders(config, sweep.jobs or ())
        hold_folder(folder)
        if sweep.jobs is not None and not has_names:
            numbers = number_jobs(folder, sweep.jobs) if sweep.is_resumed else tuple(range(len(sweep.jobs)))
            keep_places(config, numbers)
            sweep = replace(sweep, numbers=numbers)
        Announce.sweep = sweep


def hold_folder(folder: Path) -> None:
    """Until the process ends; ends it where another sweep has the folder, whose jobs and table would be mixed up.

    The lock is on the file that Hydra is about to write: the folder itself may be that of a job.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        HELD.enter_context(held(folder / COMMAND_FILE, "hydra.sweep.dir", os.O_RDWR | os.O_CREAT, folder))
    except InUse as error:
        sys.exit(report_failure(describe_exception(error), None, None))
    except OSError:
        # Hydra meets it next and says so.
        pass


def keep_places(config: DictConfig, numbers: Sequence[int]) -> None:
    """Gives each job of `config` its folder, where Hydra would take that of another job, whose results were lost.

    Hydra composes each job anew, from the overrides here and the job's own; those of the job must not be changed.
    """
    if list(numbers) == list(range(len(numbers))):
        return
    with read_write(config), open_dict(config):
        config.hydra.overrides.hydra += [
            f"+{PLACES}=[{','.join(str(number) for number in numbers)}]",
            f"{SUBDIR}='${{oc.select:\"{PLACES}.{SUBDIR_BY_NUMBER}\"}}'",
        ]


def subdir_as_typed(config: DictConfig) -> str:
    """Not resolved, which each job does for itself."""
    return str(OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"])  # type: ignore[index,call-overload]


def refuse_shared_folders(config: DictConfig, jobs: Sequence[Sequence[str]]) -> None:
    """Ends the process: of other exceptions from a callback Hydra makes warnings, and starts the jobs."""
    try:
        check_folders(config, jobs)
    except ConfigError as error:
        sys.exit(report_failure(describe_exception(error), None, None))


def expand_jobs(config: DictConfig) -> tuple[tuple[str, ...], ...] | None:
    """The overrides of each job that Hydra's basic sweeper makes of a command line; None for other sweepers."""
    if config.hydra.sweeper.get("_target_") != BasicSweeperConf._target_:
        return None
    params = config.hydra.sweeper.get("params") or {}
    # A value such as '${gpus} cards' is for each job to resolve.
    typed: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    words = [*(f"{key}={value}" for key, value in params.items()), *typed]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(words), None)
    return tuple(tuple(job) for job in jobs)
