"""Predicted against measured, of runs of task=predictions: python -m tools.predictions RUN... [--rates FILE] [--json]

RUN is a run's folder, also of one that was ended before its last workload. --rates predicts anew, from another
calibration than the runs had: what a change of the model or of a rate would make of the same measurements.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.job import Job, load_job
from launcher.plan.grid import GridPoint, point_run
from launcher.plan.timed import predict_by
from launcher.report.accuracy import POINTS_FILE, Row, point_row, summarise_errors
from launcher.report.accuracy_text import accuracy_page
from launcher.timing.fit import fit_rates
from launcher.timing.rates import Rates
from launcher.timing.store import load_calibration


def read_rows(folder: Path, rates: Rates | None) -> list[Row]:
    """The points of a run, predicted as it did, or by `rates`.

    Raises:
        OSError: it is no folder of such a run.
    """
    rows = [json.loads(line) for line in (folder / POINTS_FILE).read_text(encoding="utf-8").splitlines()]
    if rates is None:
        return rows
    job = load_job(folder / "job.json")
    return [predict_again(job, point, row, rates) for point, row in zip(job.grid, rows, strict=False)]


def predict_again(job: Job, point: GridPoint, row: Row, rates: Rates) -> Row:
    if point.plan is None:
        return row
    assert job.shape is not None
    times = predict_by(rates, point_run(job.run, point), point.plan, job.shape)
    return point_row(replace(point, times=times), row["output_tokens"], row["measured"])


def run_title(folder: Path) -> str:
    job = load_job(folder / "job.json")
    placement, limits = job.placement, job.run.limits
    memory = f" of {limits.card_memory_gib:g} GiB" if limits.card_memory_gib else ""
    peers = f", peer access {limits.peer_access.value}" if placement.world_size > 1 else ""
    rounded = "" if job.run.model.quantize.value == "none" else f" in {job.run.model.quantize.value}"
    return f"## {job.run.model.name}{rounded}, {placement.world_size} x {placement.names[0]}{memory}{peers}"


def read_rates(path: Path) -> Rates:
    """Raises ValueError: there is no calibration of this version."""
    calibration = load_calibration(path)
    if calibration is None:
        is_wrong = "is no calibration, or one of another version" if path.is_file() else "is not there"
        raise ValueError(f"--rates {path} {is_wrong}. task=calibrate makes one.")
    return fit_rates(calibration)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.predictions", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--rates", type=Path, help="a calibration, as task=calibrate keeps it")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, no tables")
    options = parser.parse_args(arguments)
    try:
        rates = None if options.rates is None else read_rates(options.rates)
        found: dict[str, list[Row]] = {str(folder): read_rows(folder, rates) for folder in options.runs}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.json:
        summaries: dict[str, Any] = {name: summarise_errors(rows) for name, rows in found.items()}
        print(json.dumps({"runs": found, "summaries": summaries}))
        return 0
    pages = (accuracy_page(run_title(Path(name)), rows) for name, rows in found.items())
    print("\n".join(pages), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
