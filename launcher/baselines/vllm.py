"""vLLM through its Python interface. It starts processes for the cards itself, from one."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from launcher.baselines.measure import Baseline
from launcher.config import WeightsKind
from launcher.config.hardware import LimitsConfig, PeerAccess
from launcher.job import Job

RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    # With it none of its workers would serve their store.
    "TORCHELASTIC_USE_AGENT_STORE",
)
# Its sums over peer access that are not NCCL's, beside disable_custom_all_reduce.
PEER_VARIABLES = ("VLLM_ALLREDUCE_USE_SYMM_MEM", "VLLM_ALLREDUCE_USE_FLASHINFER")
# What it asks for must be free when it starts, and the driver and a context have their part of every card.
MOST_OF_A_CARD = 0.9


def open_vllm(job: Job, device: torch.device) -> Baseline:
    assert job.plan is not None and job.run.num_prompt_tokens is not None
    # Those of this process would be taken for its workers' own.
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    options = within_limits(job.run.limits, torch.cuda.get_device_properties(device).total_memory)
    from vllm import LLM, SamplingParams

    workload = job.run.workload
    model = LLM(
        model=job.model_folder,
        skip_tokenizer_init=True,
        dtype=job.plan.dtype,
        tensor_parallel_size=job.plan.placement.world_size,
        max_model_len=job.run.num_prompt_tokens + workload.output_tokens,
        max_num_seqs=workload.batch_size,
        enable_prefix_caching=False,
        load_format="dummy" if job.run.model.weights == WeightsKind.dummy else "auto",
        **options,
    )

    def run(prompts: list[list[int]], num_tokens: int) -> float:
        """Seconds until all answers are there."""
        params: Any = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        sec = time.perf_counter() - start
        assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)
        return sec

    def answer(prompts: list[list[int]], num_tokens: int) -> list[float]:
        """Its answers come whole: the first token is timed by answers of one, the rest are spread evenly."""
        first = run(prompts, 1)
        if num_tokens == 1:
            return [first]
        last = run(prompts, num_tokens)
        return [first + (last - first) * token / (num_tokens - 1) for token in range(num_tokens)]

    return Baseline(answer, None)


def within_limits(limits: LimitsConfig, card_bytes: int) -> dict[str, Any]:
    """What keeps it to `limits` on cards of `card_bytes`; before it is imported, since it reads variables then."""
    options: dict[str, Any] = {}
    if limits.card_memory_gib is not None:
        options["gpu_memory_utilization"] = min(MOST_OF_A_CARD, limits.card_memory_gib * 2**30 / card_bytes)
    if limits.peer_access == PeerAccess.off:
        os.environ.update(dict.fromkeys(PEER_VARIABLES, "0"))
        options["disable_custom_all_reduce"] = True
    return options
