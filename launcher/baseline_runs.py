"""The baselines of task=bench, one after the other, in ranks of their own, once the engine's have ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launcher.config import BaselineKind, QuantizeKind, WeightsKind
from launcher.failures import RunFailed
from launcher.hardware.inventory import Inventory
from launcher.job import Job
from launcher.processes.start import SIGNAL_EXIT_CODE, StartRanks
from launcher.report.report import package_version, read_results
from launcher.watch import watch_ranks

# Those that are not called as they are here.
PACKAGES = {BaselineKind.deepspeed_zero: "deepspeed"}


def run_baselines(job: Job, inventory: Inventory, start_ranks: StartRanks) -> list[dict[str, Any]]:
    """A row each: its measurements, or under `error` why there are none.

    Raises:
        RunFailed: a signal ended the run.
    """
    return [run_baseline(job, kind, inventory, start_ranks) for kind in dict.fromkeys(job.run.bench.baselines)]


def run_baseline(job: Job, kind: BaselineKind, inventory: Inventory, start_ranks: StartRanks) -> dict[str, Any]:
    row = {"name": kind.value, "version": package_version(PACKAGES.get(kind, kind.value)), "error": refusal(job, kind)}
    if row["error"] is not None:
        return row
    job = baseline_job(job, kind)
    try:
        telemetry = watch_ranks(job, inventory, start_ranks)
    except RunFailed as error:
        if error.exit_code >= SIGNAL_EXIT_CODE:
            raise
        return row | {"error": f"{error.failure.type}: {error.failure.message}"}
    peaks = [usage.own_peak_bytes for usage in telemetry.summary() if usage.own_peak_bytes is not None]
    measured = read_results(Path(job.run_dir), job.placement.world_size)[0]
    return row | measured | {"comm_share": None, "peak_bytes": max(peaks, default=None)}


def baseline_job(job: Job, kind: BaselineKind) -> Job:
    """The job as a baseline's ranks get it, with a folder of its own."""
    folder = Path(job.run_dir) / "baselines" / kind.value
    folder.mkdir(parents=True, exist_ok=True)
    placement = job.placement
    if kind == BaselineKind.vllm:
        placement = replace(placement, world_size=1, cards=placement.cards[:1], names=placement.names[:1])
    return replace(job, run_dir=str(folder), placement=placement, baseline=kind)


def refusal(job: Job, kind: BaselineKind) -> str | None:
    """Why a baseline cannot run the job; None: it may."""
    return next((reason for reason in (rule(job) for rule in RULES[kind]) if reason), None)


def refuse_vllm(job: Job) -> str | None:
    if find_spec("vllm") is None:
        return "not installed"
    return "runs on cards only here" if job.placement.device == "cpu" else None


def refuse_folder(job: Job) -> str | None:
    return None if job.model_folder else "needs the model's folder (config.json), and model.shape is all there is"


def refuse_rounding(job: Job) -> str | None:
    kind = job.run.model.quantize
    return None if kind == QuantizeKind.none else f"does not know model.quantize={kind.value}"


def refuse_dummies(job: Job) -> str | None:
    return "needs a checkpoint, not model.weights=dummy" if job.run.model.weights == WeightsKind.dummy else None


def refuse_packed(job: Job) -> str | None:
    packed = job.shape.quantization if job.shape else "none"
    return None if packed == "none" else f"cannot shard {packed} weights"


def refuse_arrivals(job: Job) -> str | None:
    if job.run.workload.arrival_rate is None:
        return None
    return "takes whole batches: requests cannot come one by one (workload.arrival_rate)"


def refuse_resident(job: Job) -> str | None:
    if job.plan is None or job.plan.offload is None:
        return "is for layers that are streamed, and all are on the cards. Set offload.resident_layers"
    if job.plan.offload.disk_layers:
        return "has all layers in host memory, and offload.disk reads some from the disk"
    return None if job.placement.world_size == 1 else f"runs on one card here, not on {job.placement.world_size}"


PLAIN_ONLY = (refuse_dummies, refuse_packed, refuse_rounding, refuse_arrivals)
RULES: dict[BaselineKind, tuple[Callable[[Job], str | None], ...]] = {
    BaselineKind.deepspeed: PLAIN_ONLY,
    BaselineKind.transformers: PLAIN_ONLY,
    BaselineKind.vllm: (refuse_vllm, refuse_folder, refuse_rounding, refuse_arrivals),
    BaselineKind.accelerate: (refuse_resident, *PLAIN_ONLY),
    BaselineKind.deepspeed_zero: (refuse_resident, *PLAIN_ONLY),
}
