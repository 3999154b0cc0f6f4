"""DeepSpeed by itself: init_inference over a transformers model, and its generate()."""

from __future__ import annotations

import deepspeed
import torch
from transformers import AutoModelForCausalLM

from launcher.baselines.measure import Baseline
from launcher.baselines.token_times import timed_generate
from launcher.job import Job


def open_deepspeed(job: Job, device: torch.device) -> Baseline:
    assert job.plan is not None and job.run.num_prompt_tokens is not None
    spare_compiler(device)
    dtype = getattr(torch, job.plan.dtype)
    model = AutoModelForCausalLM.from_pretrained(job.model_folder, dtype=dtype)
    engine = deepspeed.init_inference(
        model,
        tensor_parallel={"tp_size": job.placement.world_size},
        dtype=dtype,
        replace_with_kernel_inject=False,
        max_out_tokens=job.run.num_prompt_tokens + job.run.workload.output_tokens,
    )
    return timed_generate(engine.module, device, engine.generate)


def spare_compiler(device: torch.device) -> None:
    """DeepSpeed's own all-reduce for CPUs needs one; without it gloo is used."""
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
