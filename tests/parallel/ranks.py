"""What the ranks of these tests run. `run_on_ranks` starts them; functions of this module take its communicator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig

from parallel.checkpoint.headers import read_checkpoint
from parallel.checkpoint.load import LoadResult, load_checkpoint
from parallel.communicator import Communicator
from parallel.engine.engine import Engine
from parallel.engine.generate import Answer, StopRules, generate_batch
from parallel.engine.sampling import Sampler, SamplingParams, gather_logits
from parallel.partition import choose_grain
from parallel.shard import ShardedModel, build_sharded_model
from tests.parallel.small_models import DEMO
from tools.local_ranks import run_on_ranks as run_on_ranks

CPU = torch.device("cpu")


@dataclass(frozen=True)
class ModelRun:
    """One rank's view of a model: its shards, the logits all ranks gathered, and the answers."""

    load: LoadResult
    progress: list[tuple[int, int]]
    shapes: dict[str, tuple[int, ...]]
    full_shapes: dict[str, tuple[int, ...]]
    on_meta: list[str]
    shares_head: bool
    logits: Tensor = field(repr=False)
    answers: list[Answer]
    vocabulary: tuple[int, ...]


def build(communicator: Communicator, folder: Path, dtype: torch.dtype = torch.float32) -> ShardedModel:
    config = AutoConfig.from_pretrained(folder)
    grain = choose_grain((config.intermediate_size, config.vocab_size), communicator.world_size)
    return build_sharded_model(config, communicator, dtype=dtype, grain=grain)


def load(communicator: Communicator, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = build(communicator, folder, dtype)
    load_checkpoint(model, read_checkpoint(folder), CPU)
    return model.module


def greedy_sampler(engine: Engine, communicator: Communicator, batch_size: int) -> Sampler:
    return sampler(engine, communicator, SamplingParams(), range(batch_size))


def sampler(engine: Engine, communicator: Communicator, params: SamplingParams, indices: Sequence[int]) -> Sampler:
    return Sampler(params, engine.vocabulary_shards, communicator, prompt_indices=indices, device=CPU)


def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def run_model(
    communicator: Communicator, folder: Path, prompts: list[list[int]], forced: list[list[int]], rules: StopRules
) -> ModelRun:
    """Loads, takes `forced` tokens step by step for their logits [step, batch, vocabulary], then generates."""
    model, progress = build(communicator, folder), []
    result = load_checkpoint(
        model, read_checkpoint(folder), CPU, on_progress=lambda done, total: progress.append((done, total))
    )
    # Chunks of 8 columns for four prompts: the longest takes several, and in the first one the shortest are padding.
    engine = Engine(model.module, CPU, max_context=64, prefill_chunk=32)
    steps = [engine.prefill(prompts)]
    for tokens in zip(*forced, strict=True):
        steps.append(engine.decode(torch.tensor(tokens)))
    logits = [gather_logits(step, engine.vocabulary_shards, communicator) for step in steps]
    answers = generate_batch(
        engine, prompts, greedy_sampler(engine, communicator, len(prompts)), demo_tokenizer(), rules
    ).answers
    module = model.module
    return ModelRun(
        load=result,
        progress=progress,
        shapes={name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)},
        full_shapes=model.full_shapes,
        on_meta=[name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta],
        shares_head=module.get_input_embeddings().weight is module.lm_head.weight,
        logits=torch.stack(logits),
        answers=answers,
        vocabulary=engine.vocabulary_shards.sizes,
    )
