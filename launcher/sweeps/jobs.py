"""The jobs of a sweep as they lie in its folder."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from launcher.report.outcome import REPORT

OVERRIDES_FILE = Path(".hydra") / "overrides.yaml"


@dataclass(frozen=True)
class SweepJob:
    """A job of a sweep; `folder` is None where it never started, `report` where it never ended."""

    number: int
    overrides: tuple[str, ...]
    folder: Path | None = None
    report: dict[str, Any] | None = None


def find_jobs(
    folder: Path, expected: Iterable[Sequence[str]] | None = None, numbers: Sequence[int] | None = None
) -> tuple[SweepJob, ...]:
    """The jobs of a sweep, in order.

    Args:
        expected: the overrides of each; what else lies in the folder is of an earlier sweep and left out. None takes
            all that is there.
        numbers: of each, where its folder has it for a name; None: as folders are found.
    """
    found = {path: read_overrides(path) for path in job_folders(folder)}
    wanted = [without_resume(overrides) for overrides in (found.values() if expected is None else expected)]
    if numbers is None:
        places = match_folders(found, wanted)
        numbers = free_numbers(places, found)
    else:
        own = zip((folder / str(number) for number in numbers), wanted, strict=True)
        places = [path if found.get(path) == overrides else None for path, overrides in own]
    return tuple(
        SweepJob(number, overrides, path, read_report(path))
        for number, overrides, path in zip(numbers, wanted, places, strict=True)
    )


def find_finished(folder: Path, besides: Iterable[SweepJob]) -> tuple[SweepJob, ...]:
    """Jobs that ended well and are none of `besides`: those of the sweep's earlier command lines."""
    others = list(besides)
    folders, numbers = {job.folder for job in others}, {job.number for job in others}
    found = find_jobs(folder)
    free = count(max((*numbers, *(job.number for job in found)), default=-1) + 1)
    return tuple(
        job if job.number not in numbers else replace(job, number=next(free))
        for job in found
        if job.folder not in folders and job.report is not None and job.report.get("error") is None
    )


def number_jobs(folder: Path, overrides: Iterable[Sequence[str]]) -> tuple[int, ...]:
    """The number of each job's folder: that of the same job before, else the next that no other has."""
    found = {path: read_overrides(path) for path in job_folders(folder) if path.name.isdecimal()}
    return free_numbers(match_folders(found, [without_resume(each) for each in overrides]), found)


def match_folders(found: dict[Path, tuple[str, ...]], wanted: Iterable[tuple[str, ...]]) -> list[Path | None]:
    """The folder of each of `wanted` in `found`; None where there is none, or none is left of several."""
    by_overrides: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    for path, overrides in found.items():
        by_overrides[overrides].append(path)
    return [by_overrides[each].pop(0) if by_overrides[each] else None for each in wanted]


def free_numbers(places: Iterable[Path | None], found: Iterable[Path]) -> tuple[int, ...]:
    """The numbers that `places` have for names; those that come after all of `found` for the others."""
    free = count(max((int(path.name) for path in found if path.name.isdecimal()), default=-1) + 1)
    return tuple(int(path.name) if path is not None and path.name.isdecimal() else next(free) for path in places)


def job_folders(folder: Path) -> list[Path]:
    """Folders of jobs, by number: 10 comes after 9."""
    folders = [path.parent.parent for path in folder.rglob(str(OVERRIDES_FILE))]

    def order(path: Path) -> tuple[int, str]:
        return (int(path.name) if path.name.isdecimal() else 10**9, str(path))

    return sorted((path for path in folders if path != folder), key=order)


def read_overrides(folder: Path) -> tuple[str, ...]:
    """None where its file was cut short, too."""
    try:
        overrides = OmegaConf.to_container(OmegaConf.load(folder / OVERRIDES_FILE))
    except (OSError, ValueError, YAMLError):
        return ()
    return without_resume(str(override) for override in cast(list[Any], overrides))


def without_resume(overrides: Iterable[str]) -> tuple[str, ...]:
    """A job is the same one when it is taken up again."""
    return tuple(override for override in overrides if key_of(override) != "resume")


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def read_report(folder: Path | None) -> dict[str, Any] | None:
    """A job's report; None where there is none or where it was cut short."""
    if folder is None:
        return None
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None
