"""transformers by itself: its tensor parallelism over DTensors and generate()."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from launcher.baselines.measure import Baseline
from launcher.baselines.token_times import timed_generate
from launcher.job import Job


def open_transformers(job: Job, device: torch.device) -> Baseline:
    assert job.plan is not None
    dtype, world_size = getattr(torch, job.plan.dtype), job.placement.world_size
    sharding = {"distributed_config": DistributedConfig(tp_size=world_size)} if world_size > 1 else {}
    model = AutoModelForCausalLM.from_pretrained(job.model_folder, dtype=dtype, **sharding)
    return timed_generate(model if sharding else model.to(device), device)
