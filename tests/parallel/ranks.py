"""What the ranks of these tests run. `run_on_ranks` starts them; functions of this module take its communicator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig

from parallel.checkpoint.headers import read_checkpoint
from parallel.checkpoint.load import LoadResult, load_checkpoint
from parallel.communicator import Communicator
from parallel.engine.answer import Answer, StopRules
from parallel.engine.engine import Engine
from parallel.engine.generate import Prompt, generate
from parallel.engine.limits import EngineLimits
from parallel.engine.sampling import SamplingParams, gather_logits
from parallel.engine.sequence import Part, TokenSequence
from parallel.engine.speculation.speculator import Speculation
from parallel.formats.scheme import Scheme
from parallel.kernels.pages import pages_for
from parallel.offload.disk_layers import DiskLayers
from parallel.offload.host_layers import HostLayers, HostLoader
from parallel.partition import choose_grain
from parallel.shard import ShardedModel, build_sharded_model
from tests.parallel.shared_memory import SharedMemory
from tests.parallel.small_models import DEMO
from tools import local_ranks

CPU = torch.device("cpu")


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_sec: float = 120) -> list[Any]:
    """As tools.local_ranks does, but that ranks talk through memory they share, not over gloo."""
    if world_size == 1:
        return local_ranks.run_on_ranks(function, 1, *args, timeout_sec=timeout_sec)
    return local_ranks.run_on_ranks(through_memory, world_size, function, *args, timeout_sec=timeout_sec)


def through_memory(communicator: Communicator, function: Callable[..., Any], *args: Any) -> Any:
    return function(SharedMemory(communicator), *args)


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


def load(
    communicator: Communicator,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    host_layers: HostLayers | None = None,
    quantize: Scheme | None = None,
) -> nn.Module:
    model = build(communicator, folder, dtype)
    on_placed = HostLoader(model.module, host_layers) if host_layers else lambda name: None
    checkpoint = read_checkpoint(folder)
    if host_layers is not None and host_layers.disk is not None:
        host_layers.disk.open(model, checkpoint, quantize)
    load_checkpoint(model, checkpoint, CPU, on_placed=on_placed, quantize=quantize)
    return model.module


def make_engine(
    communicator: Communicator,
    folder: Path,
    *,
    max_context: int = 64,
    batch_size: int = 4,
    prefill_chunk: int = 32,
    sampling: SamplingParams | None = None,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    speculation: Speculation | None = None,
    draft: Path | None = None,
    streamed: Sequence[int] = (),
    on_disk: Sequence[int] = (),
    quantize: Scheme | None = None,
    with_kv: bool = False,
    hides_sums: bool = True,
) -> Engine:
    """`draft`: the folder of a draft model, for a `speculation` that needs one. `streamed`: layers in host memory;
    `with_kv`: and their keys and values."""
    limits = EngineLimits(max_context, batch_size, prefill_chunk, hides_sums=hides_sums)
    disk = DiskLayers(on_disk, CPU) if on_disk else None
    host_layers = HostLayers(streamed, CPU, disk=disk, with_kv=with_kv) if streamed or on_disk else None
    if speculation is not None and draft is not None:
        speculation = replace(speculation, draft=load(communicator, draft, dtype))
    return Engine(
        load(communicator, folder, dtype, host_layers, quantize),
        communicator,
        limits,
        sampling=sampling,
        kv_dtype=kv_dtype,
        speculation=speculation,
        host_layers=host_layers,
    )


def numbered(prompts: Sequence[list[int]]) -> list[Prompt]:
    return [Prompt(index, ids) for index, ids in enumerate(prompts)]


def forced_logits(engine: Engine, prompts: Sequence[list[int]], forced: Sequence[Sequence[int]]) -> Tensor:
    """[step, prompt, local vocabulary]: after each prompt, and then after each of its forced tokens in turn."""
    sequences = [TokenSequence(row, prompt, max_tokens=len(forced[row]) + 1) for row, prompt in enumerate(prompts)]
    for sequence in sequences:
        sequence.pages = engine.pages.allocate(pages_for(sequence.num_tokens))
    steps = [torch.cat([prefill_whole(engine, sequence) for sequence in sequences])]
    for tokens in zip(*forced, strict=True):
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.num_sampled += 1
            engine.fresh[sequence] = torch.tensor(token, device=engine.device)
        engine.order = []
        engine.arrange(sequences)
        with torch.inference_mode():
            steps.append(engine.row_logits(engine.rows.first(len(sequences))))
    for sequence in sequences:
        engine.pages.release(sequence.pages)
    return torch.stack(steps)


def whole_logits(
    communicator: Communicator, module: nn.Module, prompts: list[list[int]], following: list[int]
) -> Tensor:
    """[2, prompt, vocabulary]: after each prompt, and after one more token. The module's weights are taken over."""
    engine = Engine(module, communicator, EngineLimits(max_context=32, batch_size=2, prefill_chunk=64))
    steps = forced_logits(engine, prompts, [[token] for token in following])
    return torch.stack([gather_logits(step, engine.sampler.shards, communicator) for step in steps])


def prefill_whole(engine: Engine, sequence: TokenSequence) -> Tensor:
    """[1, local vocabulary] after the prompt, which goes through in chunks."""
    size = engine.limits.prefill_chunk
    for start in range(0, len(sequence.prompt), size):
        parts = [Part(sequence, start, min(start + size, len(sequence.prompt)))]
        logits = engine.prefill(parts)
        engine.prefill_drafts(parts)
    return logits


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
    module = model.module
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    shares_head = module.get_input_embeddings().weight is module.lm_head.weight
    # Chunks of 8 tokens: long prompts take several passes, and some passes hold parts of several prompts.
    engine = Engine(model.module, communicator, EngineLimits(max_context=64, batch_size=3, prefill_chunk=8))
    shards = engine.sampler.shards
    logits = torch.cat(
        [
            torch.stack([gather_logits(step, shards, communicator) for step in forced_logits(engine, [p], [f])])
            for p, f in zip(prompts, forced, strict=True)
        ],
        dim=1,
    )
    # One row fewer than prompts: the last joins when another has ended.
    answers = generate(engine, numbered(prompts), demo_tokenizer(), rules).answers
    return ModelRun(
        load=result,
        progress=progress,
        shapes=shapes,
        full_shapes=model.full_shapes,
        on_meta=[name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta],
        shares_head=shares_head,
        logits=logits,
        answers=answers,
        vocabulary=shards.sizes,
    )
