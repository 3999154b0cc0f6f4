"""A sweep that goes on: the command line it had, and which of its jobs are done."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from launcher.config import ConfigError, RunConfig
from launcher.report.report import config_values
from launcher.sweeps.jobs import key_of, read_report

PREFIX = "resume="
# What OmegaConf takes for a boolean.
TRUE = ("true", "yes", "on", "y", "1")
BOOLEANS = (*TRUE, "false", "no", "off", "n", "0")
MULTIRUN_FLAGS = ("-m", "--multirun")
COMMAND_FILE = "multirun.yaml"
SUBDIR = "hydra.sweep.subdir"
# The folders of the jobs of a sweep that goes on, by their place in the command line (launcher/sweeps/announce.py).
PLACES = "hydra.callbacks.announce.places"
# What tells a job that its sweep goes on.
RESUMED = "resume=true"
# Of Hydra's own overrides, those that the new command line says again.
SAID_AGAIN = ("hydra.mode", "hydra.sweep.dir")


def resume_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line in which `resume=FOLDER` of a sweep is put in words that Hydra knows: the overrides of that sweep,
    with what was typed now in their places, its folder, and resume=true.

    Raises:
        ConfigError: FOLDER holds no sweep, or the command line is not one of a sweep.
    """
    folders = [argument for argument in arguments if is_resume_folder(argument)]
    if not folders:
        return list(arguments)
    folder = Path(resumed(folders[-1]))
    # With what follows a flag, such as the folder after --config-dir.
    flags = [argument for argument in arguments if not is_override(argument)]
    if not any(flag in MULTIRUN_FLAGS for flag in flags):
        raise ConfigError(f"resume={folder} completes a sweep: add -m. A single run is resumed by resume=true.")
    typed = [argument for argument in arguments if argument not in (*folders, *flags)]
    overrides = {key_of(argument): argument for argument in (*read_command(folder), *typed)}
    overrides.pop("resume", None)
    return [*flags, *overrides.values(), f"hydra.sweep.dir={quoted(str(folder))}", RESUMED]


def is_override(argument: str) -> bool:
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def is_resume_folder(argument: str) -> bool:
    return argument.startswith(PREFIX) and resumed(argument).lower() not in BOOLEANS


def resumed(argument: str) -> str:
    """What resume= is set to: as the shell left it, or within the quotes that Hydra wants around special characters."""
    value = argument.removeprefix(PREFIX)
    quote = value[:1]
    is_quoted = quote in ("'", '"') and len(value) > 1 and value.endswith(quote)
    return value[1:-1].replace(f"\\{quote}", quote) if is_quoted else value


def quoted(value: str) -> str:
    """For Hydra, which takes most characters only so."""
    return f"'{escaped(value)}'"


def escaped(value: str) -> str:
    """As Hydra reads it between quotes."""
    return value.replace("'", "\\'")


def read_command(folder: Path) -> list[str]:
    """The overrides that a sweep was started with.

    Raises:
        ConfigError: the folder is not one of a sweep.
    """
    try:
        # Not OmegaConf's own access: it would resolve what each job is to resolve, as in output_file='a-${gpus}.jsonl'.
        config: Any = OmegaConf.to_container(OmegaConf.load(folder / COMMAND_FILE))
        overrides = config["hydra"]["overrides"]
        words = [str(word) for word in (*overrides["hydra"], *overrides["task"])]
    except (OSError, KeyError, TypeError, YAMLError) as error:
        raise ConfigError(
            f"resume={folder} must be the folder of a sweep, which has a {COMMAND_FILE}: {error}"
        ) from error
    return [word for word in words if key_of(word) not in SAID_AGAIN and PLACES not in word]


def goes_on_with(overrides: Iterable[str]) -> bool:
    """Whether a job is told that its sweep goes on, in any of the words for it."""
    return any(key_of(each) == "resume" and each.partition("=")[2].lower() in TRUE for each in overrides)


def finished_report(run: RunConfig, run_dir: Path) -> dict[str, Any] | None:
    """The report of an earlier run of the same config in `run_dir`; None unless it came to its end."""
    report = read_report(run_dir)
    if report is None or report.get("error") is not None:
        return None
    return report if same_config(report.get("config"), run) else None


def goes_on(run: RunConfig, run_dir: Path) -> RunConfig:
    """`run`, told to complete the answers that its earlier start in `run_dir` wrote, where there are any."""
    if run.prompts_file is None:
        return run
    if run.output_file is not None:
        return replace(run, resume=True)
    try:
        job = json.loads((run_dir / "job.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return run
    return replace(run, resume=same_config(job.get("run"), run))


def same_config(values: dict[str, Any] | None, run: RunConfig) -> bool:
    """Whether stored values are those of `run`; how a run was resumed is no part of what it is."""
    return values is not None and values | {"resume": False} == config_values(run) | {"resume": False}
