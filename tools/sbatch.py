"""The text of an sbatch script: one launcher command line, or an array of them, a task each."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.slurm.needs import Needs
from launcher.sweeps.resume import escaped

# How the script tells a run that was put back into the queue: SLURM counts up from 1.
RESTARTED = '"${SLURM_RESTART_COUNT:-0}" -gt 0'


@dataclass(frozen=True)
class Script:
    """What a script is made from.

    `tasks` are the launcher's arguments of each task, `resumable` whether a restart finds answers to go on from.
    `resources` are options of sbatch with the reason for each, `options` what the user adds to them.
    """

    command: str
    name: str
    tasks: tuple[tuple[str, ...], ...]
    resumable: bool
    resources: tuple[tuple[str, str], ...]
    options: tuple[str, ...]
    folder: Path
    root: Path
    signal_sec: int
    restarts: int
    num_parallel: int | None = None

    @property
    def is_array(self) -> bool:
        return len(self.tasks) > 1


def resources_of(needs: Sequence[Needs]) -> Iterator[tuple[str, str]]:
    """sbatch options for the largest needs of all tasks, which is what an array gives each of them."""
    cards = max(needs, key=lambda each: each.num_cards)
    if cards.num_cards:
        idle = " Tasks that use fewer hold them all the same." if len({each.num_cards for each in needs}) > 1 else ""
        yield f"--gres=gpu:{cards.num_cards}", cards.why["cards"] + idle
    cores = max(needs, key=lambda each: each.num_cores)
    yield f"--cpus-per-task={cores.num_cores}", cores.why["cores"]
    memory = max(needs, key=lambda each: each.memory_gib)
    yield f"--mem={memory.memory_gib}G", memory.why["memory"]
    time = max(needs, key=lambda each: each.minutes)
    yield f"--time={time.minutes}", time.why["time"]


def render(script: Script) -> str:
    parts = (header(script), [preamble(script)], choose_task(script), [run(script)])
    return "\n".join(line for part in parts for line in part)


def header(script: Script) -> list[str]:
    lines = ["#!/bin/bash", f"# Written by: {one_line(script.command)}"]
    if script.is_array:
        lines.append(f"# An array of {len(script.tasks)} tasks; each has what the largest of them takes.")
    for option, reason in script.resources:
        lines.append(f"# {option}: {one_line(reason)}")
    options = [
        f"--job-name={script.name}",
        "--nodes=1",
        "--ntasks=1",
        *(option for option, _ in script.resources),
        f"--signal=B:TERM@{script.signal_sec}",
        "--requeue",
        "--open-mode=append",
        f"--chdir={script.folder}",
        *([f"--array=0-{len(script.tasks) - 1}{parallel(script)}"] if script.is_array else []),
        *script.options,
    ]
    return [*lines, *(f"#SBATCH {quoted(option)}" for option in options), ""]


def parallel(script: Script) -> str:
    return "" if script.num_parallel is None else f"%{script.num_parallel}"


def quoted(option: str) -> str:
    """An option with its value in quotes where sbatch would otherwise split it."""
    name, equals, value = option.partition("=")
    return f"{name}{equals}{shlex.quote(value)}" if equals else option


def one_line(text: str) -> str:
    return " ".join(text.split())


def preamble(script: Script) -> str:
    job = "${SLURM_ARRAY_JOB_ID}/${SLURM_ARRAY_TASK_ID}" if script.is_array else "${SLURM_JOB_ID}"
    return f"""set -u
# The same folder after a restart, so that it finds what was done.
run_dir={shlex.quote(escaped(str(script.root)))}/{script.name}-{job}
"""


def choose_task(script: Script) -> list[str]:
    if not script.is_array:
        return [f"arguments=({words(script.tasks[0])})"]
    cases = [f"  {number}) arguments=({words(task)}) ;;" for number, task in enumerate(script.tasks)]
    return ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]


def words(arguments: Sequence[str]) -> str:
    return " ".join(shlex.quote(argument) for argument in arguments)


def run(script: Script) -> str:
    return f"""arguments+=("hydra.run.dir='$run_dir'"){RESUME if script.resumable else ""}
ended=
child=
# Before the time limit, at scancel and at preemption: the run ends in order and keeps the answers it has.
end() {{
  ended=yes
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}}
trap end TERM

{shlex.quote(sys.executable)} -m launcher "${{arguments[@]}}" &
child=$!
[ -z "$ended" ] || kill -TERM "$child"
wait "$child"
code=$?
# A signal ends `wait`, not the run.
while kill -0 "$child" 2>/dev/null; do
  wait "$child"
  code=$?
done
{requeue(script)}exit "$code"
"""


RESUME = f"""
[ {RESTARTED} ] && arguments+=(resume=true)"""


def requeue(script: Script) -> str:
    """At the time limit the job goes back into the queue; a job that was cancelled is RUNNING no more."""
    if not script.resumable or not script.restarts:
        return ""
    return f"""if [ -n "$ended" ] && [ "$code" -ne 0 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {script.restarts} ] &&
  [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
"""


def check_name(name: str) -> str:
    """A name that is part of a path and of a shell line.

    Raises:
        ValueError: it has other characters.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise ValueError(f"--name {name}: letters, digits, '.', '_' and '-' only.")
    return name
