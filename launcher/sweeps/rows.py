"""Reports of jobs as rows of one table, as pure functions. What was not measured is None."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from launcher.sweeps.jobs import SweepJob
from parallel.units import GIB

Row = dict[str, Any]

# Of the plan's times, those that stand beside measured ones. The median of tokens waits for prompts, too; reports of
# before have the step alone.
PREDICTED = ("tokens_per_sec", "ttft_ms", "comm_share", "tokens_per_joule")

# The ends of keys whose values are files or folders.
PATH_KEYS = ("path", "file")

OK = "ok"
FAILED = "failed"
NOT_FINISHED = "not finished"
NOT_RUN = "not run"


def sweep_rows(jobs: Sequence[SweepJob]) -> list[Row]:
    """A row a job; `varies` holds those of its overrides that differ between jobs."""
    rows = [job_row(job) for job in jobs]
    keys = varying_keys([row["overrides"] for row in rows])
    return [row | {"varies": {key: row["overrides"].get(key) for key in keys}} for row in rows]


def job_row(job: SweepJob) -> Row:
    """One job's row; times in ms, memory in GiB of the fullest card."""
    status, reason = job_status(job)
    return {
        "job": job.number,
        "overrides": split_overrides(job.overrides),
        "status": status,
        "reason": reason,
        **report_values(job.report or {}),
        "folder": str(job.folder) if job.folder else None,
    }


def report_values(report: dict[str, Any]) -> Row:
    """What a report says of speed, memory and energy, flat."""
    tpot, predicted, cards = report.get("tpot_ms") or {}, report.get("predicted") or {}, report.get("cards") or []
    predicted_cards = predicted.get("cards") or cards
    return {
        "task": report.get("task"),
        "model": report.get("model"),
        "device": report.get("device"),
        "world_size": report.get("world_size"),
        "batch_size": report.get("batch_size"),
        "tokens_per_sec": report.get("tokens_per_sec"),
        "ttft_ms": report.get("ttft_ms"),
        "tpot_p50_ms": tpot.get("p50"),
        "tpot_p99_ms": tpot.get("p99"),
        "tpot_floor_ms": predicted.get("tpot_floor_ms"),
        **{f"predicted_{name}": predicted.get(name) for name in PREDICTED},
        "predicted_tpot_ms": predicted.get("itl_ms", predicted.get("tpot_ms")),
        "comm_share": report.get("comm_share"),
        "peak_gib": highest_gib(cards, "peak_bytes"),
        "predicted_gib": highest_gib(predicted_cards, "predicted_bytes"),
        "limit_gib": (report.get("limits") or {}).get("card_memory_gib"),
        "tokens_per_joule": report.get("tokens_per_joule"),
        "spread": report.get("spread") or {},
    }


def job_status(job: SweepJob) -> tuple[str, str | None]:
    """How a job ended, and why it did not end well: the type of its error and what its message begins with."""
    if job.folder is None:
        return NOT_RUN, None
    if job.report is None:
        return NOT_FINISHED, None
    error = job.report.get("error")
    if error is None:
        return OK, None
    return FAILED, f"{error['type']}: {first_sentence(str(error['message']))}"


def first_sentence(message: str) -> str:
    """The first line; with the next one where it only announces that."""
    lines = message.strip().splitlines() or [""]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def split_overrides(overrides: Sequence[str]) -> dict[str, str]:
    pairs = (override.partition("=") for override in overrides)
    return {key.lstrip("+~"): value for key, _, value in pairs}


def varying_keys(overrides: Sequence[dict[str, str]]) -> list[str]:
    """Keys whose values are not the same in all, in the order of their first appearance."""
    keys = dict.fromkeys(key for each in overrides for key in each)
    return [key for key in keys if len({each.get(key) for each in overrides}) > 1]


def without_common_folders(rows: Sequence[Row]) -> list[Row]:
    """For people: of paths that vary what they have in common is left out, so that /models/a and /models/b are a and
    b."""
    keys = [key for key in rows[0]["varies"] if key.endswith(PATH_KEYS)] if rows else []
    shared = {key: common_folder([str(row["varies"][key]) for row in rows if row["varies"][key]]) for key in keys}
    short = ({key: (row["varies"][key] or "").removeprefix(shared[key]) or None for key in keys} for row in rows)
    return [row | {"varies": row["varies"] | each} for row, each in zip(rows, short, strict=True)]


def common_folder(paths: Sequence[str]) -> str:
    """With its slash; empty where there is none."""
    folders = (path.rstrip("/").split("/")[:-1] for path in paths)
    same = takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))
    return "".join(f"{names[0]}/" for names in same)


def highest_gib(cards: Sequence[dict[str, Any]], key: str) -> float | None:
    """The fullest card; None unless every card is known."""
    values = [card.get(key) for card in cards]
    known = [value for value in values if value is not None]
    return max(known) / GIB if known and len(known) == len(values) else None
