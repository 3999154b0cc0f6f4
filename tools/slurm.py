"""An sbatch script for a run, or for a sweep as an array: python -m tools.slurm [options] OVERRIDES > job.sbatch

OVERRIDES are the launcher's, gpus=2 model=NAME; values with commas, gpus=1,2, make an array with a task for each
combination. Cards, cores, memory and time come from each run's plan, which refuses what cannot work; comments in the
script say where each figure is from, and options here replace it.

A run with prompts_file goes on from the answers it has when SLURM requeues its job, and requeues itself when its time
is over.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from launcher.config import RunConfig, to_run_config
from launcher.override_errors import composition_hint, explain_composition
from launcher.slurm.duration import WARNING_SEC
from launcher.slurm.needs import DEFAULT_CARDS, Needs, find_needs
from tools.sbatch import Script, check_name, render, resources_of

OUTPUT_FILE = "outputs.jsonl"


def build_script(overrides: Sequence[str], options: argparse.Namespace, command: str) -> Script:
    """The script of a command line.

    Raises:
        ValueError: a run cannot be composed, cannot work, or two tasks would write one file.
    """
    check_overrides(overrides)
    tasks = expand(overrides)
    runs = [compose_run(task) for task in tasks]
    check_outputs(runs)
    needs = [replace_needs(find_needs(run, options.cards), options) for run in runs]
    check_warning(options.signal_sec, max(each.minutes for each in needs))
    return Script(
        command=command,
        name=check_name(options.name),
        tasks=tuple(tuple(with_output(task, run)) for task, run in zip(tasks, runs, strict=True)),
        resumable=all(run.prompts_file is not None for run in runs),
        resources=tuple(resources_of(needs)),
        options=tuple(options.sbatch),
        folder=Path.cwd(),
        root=options.folder,
        signal_sec=options.signal_sec,
        restarts=options.restarts,
        num_parallel=options.parallel,
    )


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises ValueError for what the script itself says."""
    for override in overrides:
        key = override.partition("=")[0].lstrip("+")
        if key in ("resume", "hydra.run.dir"):
            raise ValueError(f"{override} is set by the script. Leave it out (--folder says where runs go).")


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each task."""
    try:
        parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(list(overrides))
    except HydraException as error:
        raise ValueError(explained(error, overrides)) from None
    (tasks,) = BasicSweeper.split_arguments(parsed, None)
    return [list(task) for task in tasks]


def compose_run(overrides: Sequence[str]) -> RunConfig:
    try:
        return to_run_config(compose("config", overrides=list(overrides)))
    except HydraException as error:
        raise ValueError(explained(error, overrides)) from None


def explained(error: HydraException, overrides: Sequence[str]) -> str:
    message = explain_composition(error, overrides)
    return f"{message}\n{composition_hint(message)}".rstrip()


def check_outputs(runs: Sequence[RunConfig]) -> None:
    """Raises ValueError: two tasks would write the same file of answers."""
    files = [run.output_file for run in runs if run.output_file is not None]
    for file in files:
        if files.count(file) > 1:
            raise ValueError(
                f"output_file={file} would have the answers of {files.count(file)} tasks. Put what differs in its "
                "name, as in output_file='answers-${gpus}.jsonl', or leave it out: each has a folder of its own."
            )


def check_warning(signal_sec: int, minutes: int) -> None:
    """Raises ValueError: the job would be told to end as it starts."""
    if signal_sec >= 60 * minutes:
        raise ValueError(f"--signal-sec {signal_sec} must be less than the time limit of {minutes} min. Raise --time.")


def with_output(task: Sequence[str], run: RunConfig) -> list[str]:
    """A resumed run has to say where its answers are."""
    needs_file = run.prompts_file is not None and run.output_file is None
    return [*task, *(["output_file=${hydra:runtime.output_dir}/" + OUTPUT_FILE] if needs_file else [])]


def replace_needs(needs: Needs, options: argparse.Namespace) -> Needs:
    """`needs` with what the user set himself."""
    found = {"num_cores": "cpus", "memory_gib": "mem", "minutes": "time"}
    names = {"num_cores": "cores", "memory_gib": "memory", "minutes": "time"}
    typed = {field: getattr(options, option) for field, option in found.items()}
    values = {field: value for field, value in typed.items() if value is not None}
    return replace(needs, **values, why=needs.why | {names[field]: f"--{found[field]} was set." for field in values})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.slurm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    parser.add_argument("--name", default="launch70b", help="of the job (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("slurm"), help="for the folders of runs (%(default)s)")
    parser.add_argument("--cards", default=DEFAULT_CARDS, help="conf/hardware to plan with where none are here")
    parser.add_argument("--cpus", type=whole(1), help="cores, instead of those of the plan")
    parser.add_argument("--mem", type=whole(1), metavar="GIB", help="host memory, instead of the plan's")
    parser.add_argument("--time", type=whole(1), metavar="MINUTES", help="time limit, instead of the plan's")
    parser.add_argument(
        "--signal-sec", type=whole(1), default=WARNING_SEC, help="before the limit, to end (%(default)s)"
    )
    parser.add_argument(
        "--restarts", type=whole(0), default=3, help="at the time limit, with prompts_file (%(default)s)"
    )
    parser.add_argument("--parallel", type=whole(1), help="tasks of an array that run at a time")
    parser.add_argument(
        "--sbatch",
        type=sbatch_option,
        action="append",
        default=[],
        metavar="=OPTION",
        help="as --sbatch=--partition=big",
    )
    parser.add_argument("-m", "--multirun", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    if options.multirun:
        parser.error("-m is not needed here: values with commas make an array. Leave it out.")
    return options


def whole(least: int) -> Callable[[str], int]:
    """Of an option: a whole number that is not less."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} must be a whole number from {least} on")
        return int(text)

    return read


def sbatch_option(text: str) -> str:
    if not text.startswith("-"):
        raise argparse.ArgumentTypeError(f"{text} must be an option of sbatch, as in --sbatch=--partition=big")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    typed = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(typed)
    ConfigStore.instance().store(group="schema", name="run", node=RunConfig)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("conf", version_base="1.3"):
            script = build_script(options.overrides, options, f"python -m tools.slurm {shlex.join(typed)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.stdout.write(render(script))
    return 0


if __name__ == "__main__":
    sys.exit(main())
