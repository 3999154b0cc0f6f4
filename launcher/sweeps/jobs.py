"""The jobs of a sweep as they lie in its folder."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from launcher.report.outcome import REPORT

OVERRIDES_FILE = Path(".hydra") / "overrides.yaml"


@dataclass(frozen=True)
class SweepJob:
    """A job of a sweep; `folder` is None where it never started, `report` where it never ended."""

    number: int
    overrides: tuple[str, ...]
    folder: Path | None = None
    report: dict[str, Any] | None = None


def find_jobs(folder: Path, expected: Iterable[Sequence[str]] | None = None) -> tuple[SweepJob, ...]:
    """The jobs of a sweep, in order.

    Args:
        expected: the overrides of each; what else lies in the folder is of an earlier sweep and left out. None takes
            all that is there.
    """
    found: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    in_order: list[tuple[str, ...]] = []
    for path in job_folders(folder):
        overrides = read_overrides(path)
        found[overrides].append(path)
        in_order.append(overrides)
    wanted = in_order if expected is None else [without_resume(overrides) for overrides in expected]
    jobs = []
    for number, overrides in enumerate(wanted):
        path_or_none = found[overrides].pop(0) if found[overrides] else None
        jobs.append(SweepJob(number, overrides, path_or_none, read_report(path_or_none)))
    return tuple(jobs)


def job_folders(folder: Path) -> list[Path]:
    """Folders of jobs, by number: 10 comes after 9."""
    folders = [path.parent.parent for path in folder.rglob(str(OVERRIDES_FILE))]

    def order(path: Path) -> tuple[int, str]:
        return (int(path.name) if path.name.isdecimal() else 10**9, str(path))

    return sorted((path for path in folders if path != folder), key=order)


def read_overrides(folder: Path) -> tuple[str, ...]:
    overrides = OmegaConf.to_container(OmegaConf.load(folder / OVERRIDES_FILE))
    return without_resume(str(override) for override in cast(list[Any], overrides))


def without_resume(overrides: Iterable[str]) -> tuple[str, ...]:
    """A job is the same one when it is taken up again."""
    return tuple(override for override in overrides if not override.startswith("resume="))


def read_report(folder: Path | None) -> dict[str, Any] | None:
    """A job's report; None where there is none or where it was cut short."""
    if folder is None:
        return None
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None
