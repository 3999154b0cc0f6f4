"""DeepSpeed's ZeRO-3 with all parameters in pinned host memory, read ahead by a layer, and transformers' generate()."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from launcher.baselines.deepspeed import spare_compiler
from launcher.baselines.measure import Baseline
from launcher.baselines.token_times import timed_generate
from launcher.job import Job
from launcher.models.shape import ModelShape


def open_deepspeed_zero(job: Job, device: torch.device) -> Baseline:
    assert job.plan is not None and job.shape is not None
    spare_compiler(device)
    config = zero_config(job.shape, job.plan.dtype, is_pinned=device.type == "cuda")
    # from_pretrained looks for a configuration that lives, and then makes parameters that are in host memory.
    held = HfDeepSpeedConfig(config)
    model = AutoModelForCausalLM.from_pretrained(job.model_folder, dtype=getattr(torch, job.plan.dtype))
    engine = deepspeed.initialize(model=model, config=held.config)[0]
    engine.module.eval()
    return timed_generate(engine.module, device)


def zero_config(shape: ModelShape, dtype: str, *, is_pinned: bool) -> dict[str, Any]:
    """Room for the layer that is computed and the one that is read ahead; sizes are in parameters."""
    layer = layer_parameters(shape)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu", "pin_memory": is_pinned},
            "stage3_prefetch_bucket_size": layer,
            "stage3_max_live_parameters": 3 * layer,
            # Norms stay on the card.
            "stage3_param_persistence_threshold": shape.hidden_size,
        },
    }


def layer_parameters(shape: ModelShape) -> int:
    """Of the linears of a layer."""
    heads = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    return shape.hidden_size * (heads + 3 * shape.intermediate_size)
