"""Jobs of a sweep that hydra.sweep.subdir would put into one folder, where the last would be all that is left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from launcher.config import ConfigError


def check_folders(config: DictConfig, jobs: Sequence[Sequence[str]]) -> None:
    """Raises ConfigError: two of `jobs`, the overrides of each, would have the same folder."""
    taken: dict[Path, int] = {}
    for number, overrides in enumerate(jobs):
        subdir = subdir_of(config, overrides, number)
        if subdir is None:
            continue
        first = taken.setdefault(Path(subdir), number)
        if first != number:
            raise ConfigError(
                f"hydra.sweep.subdir puts jobs {first} ({' '.join(jobs[first])}) and {number} ({' '.join(overrides)}) "
                f"into one folder, {subdir}. Put all that differs in it, or leave it out: jobs are then numbered."
            )


def subdir_of(config: DictConfig, overrides: Sequence[str], number: int) -> str | None:
    """None for values that cannot be composed, which the job itself says."""
    singleton = HydraConfig.instance()
    before = singleton.cfg
    try:
        job = GlobalHydra.instance().config_loader().load_sweep_config(config, list(overrides))
        with read_write(job), open_dict(job):
            job.hydra.job.num, job.hydra.job.id = number, str(number)
        singleton.set_config(job)
        return str(job.hydra.sweep.subdir)
    except (HydraException, OmegaConfBaseException):
        return None
    finally:
        singleton.cfg = before
