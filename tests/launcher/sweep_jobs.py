"""Jobs of a sweep with the reports that a bench of two cards leaves, made without running any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from parallel.units import GIB

TIMES = {"tpot_floor_ms": 5.0, "tokens_per_sec": 110.0, "ttft_ms": 115.0, "tpot_ms": 7.0, "comm_share": 0.06}
TIMES |= {"itl_ms": 7.5, "tokens_per_joule": 0.3}
FAILURE = {"type": "ConfigError", "message": "it needs 39.83 GiB | too much.\nAnd more.", "hint": ""}


def bench_report(world_size: int = 2, **fields: Any) -> dict[str, Any]:
    """Peak memory is 21 GiB on the first card and 22 on the others, predicted is half a GiB more."""
    peaks = [21 * GIB, *[22 * GIB] * (world_size - 1)]
    report: dict[str, Any] = {
        "task": "bench",
        "model": "some-70b",
        "device": "cuda",
        "world_size": world_size,
        "batch_size": 1,
        "limits": {"card_memory_gib": 24.0, "peer_access": "off"},
        "tokens_per_sec": 100.0,
        "ttft_ms": 120.0,
        "tpot_ms": {"p50": 8.0, "p99": 9.0},
        "comm_share": 0.08,
        "tokens_per_joule": 0.25,
        "cards": [{"peak_bytes": peak, "predicted_bytes": peak + GIB // 2} for peak in peaks],
        "predicted": TIMES | {"cards": [{"predicted_bytes": peak + GIB // 2} for peak in peaks]},
        "spread": {"ttft_ms": {"min": 118.0, "max": 125.0}},
        "versions": {"torch": "2.13.0"},
    }
    return report | fields


def failed_report() -> dict[str, Any]:
    measured = ("world_size", "device", "tokens_per_sec", "ttft_ms", "tpot_ms", "comm_share", "predicted")
    return {"task": "bench", "model": "some-70b", "cards": [], "error": FAILURE} | dict.fromkeys(measured)


def write_job(sweep: Path, number: int, overrides: list[str], report: dict[str, Any] | None, power: str = "") -> Path:
    """`power`: the watts of card 0, a sample a second, with spaces between."""
    folder = sweep / str(number)
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    if report is not None:
        (folder / "report.json").write_text(json.dumps(report))
    lines = [f"{second}.000,0,{watts}" for second, watts in enumerate(power.split())]
    (folder / "telemetry.csv").write_text("\n".join(["time_sec,index,power_w", *lines, ""]))
    return folder
