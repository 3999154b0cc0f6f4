"""transformers' generate() with a look at the clock after each token."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria

from launcher.baselines.measure import Baseline


class Clock(StoppingCriteria):
    """Stops nothing; `times` are the seconds since `start` at which the device had each token."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, list[float]()
        self.start = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(self.now() - self.start)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def timed_generate(model: PreTrainedModel, device: torch.device, generate: Any = None) -> Baseline:
    """Greedy answers that no end-of-sequence token ends, by `generate` or else the model's own."""
    generate = generate or model.generate
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def answer(prompts: list[list[int]], num_tokens: int) -> list[float]:
        ids = torch.tensor(prompts, device=device)
        clock = Clock(device)
        # By position: DeepSpeed refuses long prompts that come by name.
        output = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            stopping_criteria=[clock],
        )
        assert output.shape[1] - ids.shape[1] == len(clock.times) == num_tokens, f"{output.shape=} of {ids.shape=}"
        return clock.times

    return Baseline(answer, sum(held_bytes(tensor) for tensor in model.parameters()))


def held_bytes(tensor: Any) -> int:
    """This rank's part of a DTensor; a plain tensor is all there is, and nothing while its numbers lie elsewhere."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return 0 if part.is_meta else part.nbytes
