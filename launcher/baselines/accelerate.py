"""transformers with accelerate's hooks: the plan's resident layers on the card, the others in the host's memory."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from launcher.baselines.measure import Baseline
from launcher.baselines.token_times import timed_generate
from launcher.job import Job

# What a causal language model of transformers has besides its layers.
BESIDE_LAYERS = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")


def open_accelerate(job: Job, device: torch.device) -> Baseline:
    """Before its turn a hook copies each tensor of a layer to the card, and drops it afterwards."""
    assert job.plan is not None and job.plan.offload is not None and job.shape is not None
    streamed = job.plan.offload.streamed_layers
    model = AutoModelForCausalLM.from_pretrained(
        job.model_folder,
        dtype=getattr(torch, job.plan.dtype),
        device_map=place_modules(job.shape.num_layers, streamed, device),
    )
    return timed_generate(model, device)


def place_modules(num_layers: int, streamed: tuple[int, ...], device: torch.device) -> dict[str, str]:
    """Where each module lies, for `device_map`; accelerate compares names, so that a torch.device would not do."""
    layers = {f"model.layers.{layer}": "cpu" if layer in streamed else str(device) for layer in range(num_layers)}
    return layers | dict.fromkeys(BESIDE_LAYERS, str(device))
