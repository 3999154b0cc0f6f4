"""Training and scoring of the demo model."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from tools.demo.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE

CONTEXT = 1024
WARMUP = 0.02
FINAL_LR = 0.02
EVALUATIONS = 24
SECONDS_PER_MINUTE = 60.0


@dataclass(frozen=True)
class TrainingPlan:
    """What one training run is asked for. It ends at `steps` or `minutes`, whichever is given and comes first."""

    steps: int | None
    minutes: float | None
    batch: int
    sequence: int
    lr: float
    weight_decay: float
    seed: int

    def progress(self, step: int, elapsed_sec: float) -> float:
        """Share of the run that is done, in [0, 1]; the schedule follows it, so a slow machine still cools down."""
        by_step = step / self.steps if self.steps else 0.0
        by_time = elapsed_sec / (self.minutes * SECONDS_PER_MINUTE) if self.minutes else 0.0
        return min(1.0, max(by_step, by_time))


@dataclass(frozen=True)
class TrainingResult:
    """How the run went; `history` holds (step, held-out loss in nats per token)."""

    steps: int
    best_step: int
    seconds: float
    compiled: bool
    history: tuple[tuple[int, float], ...]


def demo_config() -> LlamaConfig:
    """The smallest shape that meets every path of the engine.

    8 query and 4 KV heads split over 1, 2 and 4 ranks, and unevenly over 3; a KV group's 2 x 64 inputs of the output
    projection are one 128-wide quantisation group; 14 MB in bf16.
    """
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=768,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def learning_rate_factor(progress: float) -> float:
    """Linear warm-up, then a cosine down to FINAL_LR of the peak."""
    if progress < WARMUP:
        return max(progress / WARMUP, 0.01)
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))
    return FINAL_LR + (1 - FINAL_LR) * cosine


def train(
    model: LlamaForCausalLM, stream: NDArray[np.int64], held_out: NDArray[np.int64], plan: TrainingPlan
) -> TrainingResult:
    """Fit `model` (float32, on its device) to `stream`; leave in it the weights with the best held-out loss."""
    device = model.device
    optimizer = _optimizer(model, plan)
    loss_of, compiled = _loss_function(model, plan)
    batches = _batches(torch.from_numpy(stream).to(device), plan)
    history: list[tuple[int, float]] = []
    best: tuple[int, float, dict[str, Tensor]] = (0, math.inf, {})
    start, step, done, running = time.perf_counter(), 0, 0.0, math.nan
    while done < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * learning_rate_factor(done)
        loss = loss_of(*next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 10 == 0:
            running = loss.item()  # waits for the device, so that the clock counts finished steps
        done = plan.progress(step, time.perf_counter() - start)
        if done >= (len(history) + 1) / EVALUATIONS:
            score = evaluate(model, held_out, plan.sequence)
            history.append((step, score))
            elapsed_sec = time.perf_counter() - start
            print(f"{elapsed_sec:6.1f} s  step {step:6d}  train {running:.3f}  held-out {score:.4f}", flush=True)
            if score < best[1]:
                best = (step, score, {name: value.cpu().clone() for name, value in model.state_dict().items()})
    model.load_state_dict(best[2])
    return TrainingResult(step, best[0], time.perf_counter() - start, compiled, tuple(history))


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, stream: NDArray[np.int64], sequence: int, batch: int = 32) -> float:
    """Mean loss in nats of `stream[2:]`, float32, in windows of `sequence` that each start afresh after a BOS.

    Nothing is carried from one window to the next: at a window's first tokens the model sees less than the trigram
    does, which makes its figure the more cautious of the two.
    """
    targets = torch.from_numpy(stream[2:])
    num_full = len(targets) // sequence
    full, rest = targets[: num_full * sequence].view(num_full, sequence), targets[num_full * sequence :]
    total = 0.0
    for window in (*full.split(batch), rest[None]):
        if window.numel():
            logits = model(_after_bos(window).to(model.device), use_cache=False).logits.float()
            expected = window.flatten().to(model.device)
            total += functional.cross_entropy(logits.flatten(0, 1), expected, reduction="sum").item()
    return total / len(targets)


def _after_bos(window: Tensor) -> Tensor:
    """Inputs that predict `window` [rows, tokens]: a BOS first, as in every prompt, also where the text is mid-file."""
    return torch.cat([torch.full_like(window[:, :1], BOS_ID), window[:, :-1]], dim=1)


def _batches(stream: Tensor, plan: TrainingPlan) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, targets), each [batch, sequence], at random offsets: no two epochs cut the text alike."""
    generator = torch.Generator(device=stream.device).manual_seed(plan.seed)
    num_offsets = len(stream) - plan.sequence + 1
    if num_offsets < 1:
        raise ValueError(f"{len(stream)} training tokens do not fill a sequence of {plan.sequence}; raise --max-files")
    within = torch.arange(plan.sequence, device=stream.device)
    while True:
        offsets = torch.randint(num_offsets, (plan.batch, 1), generator=generator, device=stream.device)
        window = stream[offsets + within]
        yield _after_bos(window), window


def _optimizer(model: LlamaForCausalLM, plan: TrainingPlan) -> torch.optim.AdamW:
    """Decay on matrices only: norms' gains belong near one, not near zero."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.95), fused=model.device.type == "cuda")


def _loss_function(model: LlamaForCausalLM, plan: TrainingPlan) -> tuple[Callable[[Tensor, Tensor], Tensor], bool]:
    """(loss of a batch, whether it is compiled). Compiled before the clock starts, on CUDA, where it is worth it."""

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
            logits = model(inputs, use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    if model.device.type != "cuda":
        return loss, False
    compiled = torch.compile(loss)
    dummy = torch.zeros(plan.batch, plan.sequence, dtype=torch.long, device=model.device)
    try:
        compiled(dummy, dummy).backward()
    except Exception as error:  # a machine without a C compiler still trains, only slower
        print(f"torch.compile failed ({type(error).__name__}: {error}); training eagerly", flush=True)
        compiled = loss
    model.zero_grad(set_to_none=True)
    return compiled, compiled is not loss
