"""What the parent tells the ranks: one file, job.json, with the config, the plan and the prompts, all typed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from launcher.config import BaselineKind, PeerAccess, RunConfig
from launcher.models.draft import Draft
from launcher.models.shape import ModelShape
from launcher.plan.grid import GridPoint
from launcher.plan.plan import Plan
from launcher.plan.topology import Placement
from launcher.prompts import Prompt
from launcher.timing.predict import Times


@dataclass(frozen=True)
class Job:
    """A run that is decided: ranks take everything from here and read no other configuration."""

    run: RunConfig
    placement: Placement
    run_dir: str
    host_cores: int
    # What a task that loads a model needs besides; None and empty for the others.
    plan: Plan | None = None
    shape: ModelShape | None = None
    # None where weights are dummies of a model that is not on this machine.
    model_folder: str | None = None
    # Where layers are read from in every pass; None where none are.
    disk_folder: str | None = None
    # The small model that guesses, where one does.
    draft: Draft | None = None
    prompts: tuple[Prompt, ...] = ()
    # Of task=predictions; `plan` is then the one that takes most.
    grid: tuple[GridPoint, ...] = ()
    # What its steps should take, or why that cannot be told; None where nothing was asked.
    times: Times | str | None = None
    # Set where ranks are to run this instead of our engine.
    baseline: BaselineKind | None = None
    # Of tasks without a plan: passes of prompts that are captured as graphs at a time.
    captured_passes: int = 0
    # When the parent took it up, in seconds since 1970.
    started: float = 0.0

    @property
    def elapsed_sec(self) -> float:
        """Since the parent took it up."""
        return time.time() - self.started

    @property
    def output_path(self) -> Path:
        return Path(self.run.output_file or Path(self.run_dir) / "outputs.jsonl")


def save_job(job: Job) -> Path:
    path = Path(job.run_dir) / "job.json"
    path.write_bytes(TypeAdapter(Job).dump_json(job, indent=1))
    return path


def load_job(path: Path) -> Job:
    return TypeAdapter(Job).validate_json(path.read_bytes())


def build_environment(job: Job) -> dict[str, str]:
    """Environment variables that every rank of `job` needs before it imports torch."""
    threads = max(1, job.host_cores // job.placement.world_size)
    environment = {
        # NVML counts cards in PCI order; without this CUDA may count them by speed.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        # The parent has downloaded what is needed; a rank that goes to the network would hang a run offline.
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
    }
    if job.placement.device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    else:
        # DeepSpeed would try one accelerator's package after the other.
        environment["DS_ACCELERATOR"] = "cuda"
        # The most there are. Streams that share one of the card's queues, eight by default, wait for one another:
        # products behind the sums that they are to hide.
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
    if job.run.limits.peer_access == PeerAccess.off:
        environment["NCCL_P2P_DISABLE"] = "1"
    return environment
