"""What a run found out, as one object: report.json in the run folder and the last line on stdout.

Fields are added, never renamed; what was not measured is null, never zero; predictions stand under `predicted`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from launcher.config import RunConfig, TaskKind
from launcher.failures import Failure
from launcher.finished import read_finished
from launcher.hardware.inventory import Inventory
from launcher.job import Job
from launcher.plan.offload import OffloadPlan
from launcher.plan.plan import Plan
from launcher.telemetry.sampler import Telemetry
from launcher.telemetry.usage import CardUsage
from launcher.timing.predict import Times

PACKAGES = ("launch70b", "torch", "transformers", "deepspeed", "hydra-core", "safetensors")
MEASURED_BY_RANKS = (
    "transport",
    "warm_up_sec",
    "startup",
    "fused_rows",
    "ttft_ms",
    "tpot_ms",
    "prefix_cache",
    "speculation",
    "offload",
    "comm_share",
    "decode_step_ms",
    "all_reduce",
    "calibration",
    "loads",
    "outputs",
    "workload",
    "requests",
    "prefill_tokens_per_sec",
    "spread",
    "bandwidth_share",
    "bandwidth",
    "passes",
    "breakdown",
    "prefill_breakdown",
    "predictions",
)
# tpot_ms is a step; itl_ms is what the median of measured tokens is compared with, which may wait for prompts.
PREDICTED_TIMES = (
    "ttft_ms",
    "tpot_ms",
    "itl_ms",
    "tokens_per_sec",
    "prefill_tokens_per_sec",
    "comm_share",
    "tokens_per_joule",
)
# Of these, what hangs on when requests come.
WHOLE_RUN_TIMES = ("ttft_ms", "itl_ms", "tokens_per_sec", "tokens_per_joule")
MEASURED = (
    "transport",
    "load",
    "kernels",
    "fused_rows",
    "ttft_ms",
    "tpot_ms",
    "prefix_cache",
    "speculation",
    "offload",
    "tokens_per_sec",
    "tokens_per_joule",
    "comm_share",
)


def build_report(job: Job, inventory: Inventory, telemetry: Telemetry) -> dict[str, Any]:
    """Joins what the plan predicted, the ranks measured and the sampler saw."""
    results = read_results(Path(job.run_dir), job.placement.world_size)
    report = base_report(job)
    report |= {name: results[0][name] for name in MEASURED_BY_RANKS if name in results[0]}
    report["load"] = join_loads(results)
    report["kernels"] = join_kernels(results)
    report |= speed(results[0], telemetry)
    usages = telemetry.summary()
    report["cards"] = [
        card_report(job, rank, usage, result) for rank, (usage, result) in enumerate(zip(usages, results, strict=True))
    ]
    report["inventory"] = asdict(inventory)
    return report


def read_results(run_dir: Path, world_size: int) -> list[dict[str, Any]]:
    """Each rank's results, in rank order."""
    return [json.loads((run_dir / "ranks" / f"{rank}.json").read_text()) for rank in range(world_size)]


def base_report(job: Job) -> dict[str, Any]:
    """The fields that every report has, with null where nothing has been measured."""
    run, placement, plan = job.run, job.placement, job.plan
    report: dict[str, Any] = {
        "task": run.task.kind.value,
        "model": run.model.name if plan else None,
        "weights": run.model.weights.value if plan else None,
        "quantize": run.model.quantize.value if plan else None,
        "world_size": placement.world_size,
        "device": placement.device,
        "topology": placement.topology,
        "topology_reason": placement.topology_reason,
        "limits": asdict(run.limits),
        **dict.fromkeys(MEASURED),
        "cards": [],
        "predicted": None,
        "run_dir": job.run_dir,
        "command": sys.argv[1:],
        "config": config_values(run),
        "versions": versions(),
    }
    return report if plan is None else report | planned(plan, job.times, incomparable(job))


def incomparable(job: Job) -> tuple[str, ...]:
    """Predicted times that are not of the requests that are measured: those are of one batch."""
    is_more = {
        TaskKind.bench: bool(job.run.workload.beyond_a_batch()),
        TaskKind.generate: len(job.prompts) > job.run.workload.batch_size,
    }
    return WHOLE_RUN_TIMES if is_more.get(job.run.task.kind, False) else ()


def config_values(run: RunConfig) -> dict[str, Any]:
    """Every value of a config, as JSON has them."""
    values: dict[str, Any] = TypeAdapter(RunConfig).dump_python(run, mode="json")
    return values


def planned(plan: Plan, times: Times | str | None, left_out: Collection[str] = ()) -> dict[str, Any]:
    """What the plan decided, and what it predicts, but for the times `left_out`."""
    cards = [{"name": card.name, "predicted_bytes": card.predicted_bytes, "lines": card.lines} for card in plan.cards]
    return {
        "dtype": plan.dtype,
        "batch_size": plan.batch_size,
        "max_context": plan.max_context,
        "prefill_chunk_while_decoding": plan.prefill_chunk_while_decoding,
        "captured_passes": plan.captured_passes,
        "predicted": {
            "longest_wait_ms": plan.longest_wait_ms,
            "tpot_floor_ms": plan.tpot_floor_ms,
            "kv_tokens_that_fit": plan.kv_tokens_that_fit,
            "offload": None if plan.offload is None else planned_offload(plan.offload),
            "cards": cards,
            **predicted_times(times),
            **dict.fromkeys(left_out),
        },
    }


def planned_offload(offload: OffloadPlan) -> dict[str, Any]:
    return asdict(offload) | {"pass_ms": offload.pass_ms, "kv_token_ms": offload.kv_token_ms}


def predicted_times(times: Times | str | None) -> dict[str, Any]:
    """The measured fields' names, null where nothing could be told, and how the figures came about."""
    if not isinstance(times, Times):
        return dict.fromkeys((*PREDICTED_TIMES, "times")) | {"no_times_because": times}
    return {name: getattr(times, name) for name in PREDICTED_TIMES} | {"times": asdict(times)}


def join_loads(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The load of all ranks as one: it lasts as long as the slowest, and reads what all read."""
    loads = [result["load"] for result in results if result.get("load")]
    if not loads:
        return None
    slowest, total = max(loads, key=lambda load: load["sec"]), sum(load["bytes_read"] for load in loads)
    sec = slowest["sec"]
    return {
        "sec": sec,
        # Of the slowest rank: what held it up. The rest is copies to the card.
        "disk_wait_sec": slowest["disk_wait_sec"],
        "decode_sec": slowest["decode_sec"],
        "bytes_read": total,
        "gb_per_sec": total / sec / 1e9 if total else None,
        "bytes_read_per_rank": [load["bytes_read"] for load in loads],
        # Of the first rank: how many quantised linears got which kernel, and why.
        "kernels": loads[0].get("kernels", {}),
    }


def join_kernels(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The kernels of all ranks: own are those that no rank computes in plain torch."""
    found = [result["kernels"] for result in results if result.get("kernels")]
    if not found:
        return None
    plain = {name: why_not for each in reversed(found) for name, why_not in each["plain_torch"].items()}
    own = dict.fromkeys(name for each in found for name in each["own"] if name not in plain)
    return {"own": list(own), "plain_torch": plain}


def speed(result: dict[str, Any], telemetry: Telemetry) -> dict[str, Any]:
    """Tokens per second and per joule over all generation, prefill included; a rank that timed several runs knows their
    rate itself."""
    spans = result.get("generation")
    if not spans or not result["generated_tokens"]:
        return {"tokens_per_sec": None, "tokens_per_joule": None}
    tokens = result["generated_tokens"]
    joules = [telemetry.energy_between(start, end) for start, end in spans]
    energy_j = None if None in joules else sum(filter(None, joules))
    return {
        "generated_tokens": tokens,
        "tokens_per_sec": result.get("tokens_per_sec") or tokens / sum(end - start for start, end in spans),
        "tokens_per_joule": tokens / energy_j if energy_j else None,
    }


def card_report(job: Job, rank: int, usage: CardUsage, result: dict[str, Any]) -> dict[str, Any]:
    """One rank's card. `peak_bytes` is this run's own: what others held before it stands in `baseline_bytes`.

    `host_peak_bytes` is of the rank's process: the most that was resident, mapped files and shared pages included.
    """
    seen = asdict(usage) | {"peak_bytes": usage.own_peak_bytes}
    predicted_bytes = job.plan.cards[rank].predicted_bytes if job.plan else None
    from_rank = {name: result.get(name) for name in ("memory", "host_peak_bytes")}
    return seen | {"name": job.placement.names[rank], "predicted_bytes": predicted_bytes} | from_rank


def failure_report(failure: Failure, run: RunConfig | None, run_dir: Path | None) -> dict[str, Any]:
    """The line of a run that failed: every field of a report, null as far as it never came to it.

    `incomplete` has what it had measured by then.
    """
    return {
        "task": run.task.kind.value if run else None,
        "model": run.model.name if run else None,
        "weights": run.model.weights.value if run else None,
        "quantize": run.model.quantize.value if run else None,
        **dict.fromkeys(("world_size", "device", "topology", *MEASURED, "predicted", "outputs")),
        "cards": [],
        "error": asdict(failure),
        "incomplete": read_finished(run_dir) if run_dir else None,
        "run_dir": str(run_dir) if run_dir else None,
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    return {name: package_version(name) for name in PACKAGES}


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
