"""What task=bench compares this engine with, each in ranks of its own: a rank's part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from launcher.baselines.accelerate import open_accelerate
from launcher.baselines.deepspeed import open_deepspeed
from launcher.baselines.deepspeed_zero import open_deepspeed_zero
from launcher.baselines.measure import Baseline, measure
from launcher.baselines.transformers import open_transformers
from launcher.baselines.vllm import open_vllm
from launcher.config import BaselineKind
from launcher.events import EventWriter
from launcher.job import Job
from launcher.rank.context import open_device

BASELINES: dict[BaselineKind, Callable[[Job, torch.device], Baseline]] = {
    BaselineKind.deepspeed: open_deepspeed,
    BaselineKind.transformers: open_transformers,
    BaselineKind.vllm: open_vllm,
    BaselineKind.accelerate: open_accelerate,
    BaselineKind.deepspeed_zero: open_deepspeed_zero,
}


def run_baseline(job: Job, rank: int, events: EventWriter) -> dict[str, Any]:
    """Loads the job's model as the baseline does, and measures it on the job's workload."""
    assert job.baseline is not None
    device = open_device(job, rank)
    return measure(job, BASELINES[job.baseline](job, device), events)
