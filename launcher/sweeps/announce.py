"""Which sweep this process runs: Hydra tells a callback before the first job, and nobody after a job that failed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig


@dataclass(frozen=True)
class Sweep:
    """`jobs` holds the overrides of each job, by its number; None where a sweeper decides them as it goes."""

    folder: Path
    jobs: tuple[tuple[str, ...], ...] | None


class Announce(Callback):
    """Configured in conf/config.yaml; `sweep` is None until a sweep starts."""

    sweep: ClassVar[Sweep | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        Announce.sweep = Sweep(Path(config.hydra.sweep.dir).absolute(), expand_jobs(config))


def expand_jobs(config: DictConfig) -> tuple[tuple[str, ...], ...] | None:
    """The overrides of each job that Hydra's basic sweeper makes of a command line; None for other sweepers."""
    if config.hydra.sweeper.get("_target_") != BasicSweeperConf._target_:
        return None
    params = config.hydra.sweeper.get("params") or {}
    words = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(words), None)
    return tuple(tuple(job) for job in jobs)
