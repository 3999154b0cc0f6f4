"""task=generate: load the model, answer the prompts, measure as it goes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from launcher.config import SamplingConfig
from launcher.plan import Plan
from launcher.prompts import Prompt, prompt_key
from launcher.rank import RankContext
from launcher.tasks.measure import communication, latencies, memory
from parallel.checkpoint.headers import read_checkpoint
from parallel.checkpoint.load import LoadResult, load_checkpoint
from parallel.engine.engine import Engine
from parallel.engine.generate import Answer, BatchResult, StopRules, generate_batch
from parallel.engine.sampling import Sampler, SamplingParams
from parallel.shard import build_sharded_model

WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class LoadedModel:
    """An engine over a loaded model, with what turns text into tokens and back."""

    engine: Engine
    tokenizer: PreTrainedTokenizerFast
    rules: StopRules
    load: LoadResult


def run_generate(context: RankContext) -> dict[str, Any]:
    """Answers every prompt of the job. Rank 0 writes the answers; all ranks return the same measurements.

    Raises:
        ValueError: a prompt that does not fit the cache, or chat messages for a model without a chat template.
        RuntimeError: ranks picked different tokens.
    """
    job = context.job
    assert job.model_folder is not None and job.plan is not None, "the parent plans a model for this task"
    tokenizer = AutoTokenizer.from_pretrained(job.model_folder)
    # Before the weights: a prompt that cannot be answered is told in seconds.
    token_ids = encode_prompts(tokenizer, job.prompts, use_chat=job.run.chat)
    check_lengths(job.prompts, token_ids, job.plan.max_context)
    loaded = load_model(context, job.model_folder, job.plan, tokenizer)
    warm_up_sec = warm_up(loaded.engine, token_ids[: job.run.workload.batch_size])
    started = time.time()
    outputs, batches = answer_prompts(context, loaded, token_ids)
    ended = time.time()
    return {
        "transport": context.transport_summary(),
        "load": {**asdict(loaded.load), "gb_per_sec": loaded.load.bytes_read / loaded.load.sec / 1e9},
        "warm_up_sec": warm_up_sec,
        **latencies(batches),
        "generated_tokens": sum(len(answer.token_ids) for batch in batches for answer in batch.answers),
        "generation": {"start": started, "end": ended},
        **communication(context, loaded.engine, batches),
        "memory": memory(context.device, loaded.engine),
        "outputs": outputs,
    }


def load_model(context: RankContext, folder: str, plan: Plan, tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    run = context.job.run
    model = build_sharded_model(
        AutoConfig.from_pretrained(folder),
        context.communicator,
        dtype=getattr(torch, plan.dtype),
        grain=plan.grain,
    )
    load = load_checkpoint(
        model,
        read_checkpoint(Path(folder)),
        context.device,
        on_progress=lambda done, total: context.events.progress(
            "loading weights", done, total, "bytes", each_rank=True
        ),
    )
    engine = Engine(
        model.module,
        context.device,
        max_context=plan.max_context,
        prefill_chunk=run.engine.prefill_chunk,
    )
    rules = StopRules(
        max_tokens=run.workload.output_tokens,
        eos_ids=eos_token_ids(folder, tokenizer),
        texts=tuple(run.sampling.stop),
    )
    return LoadedModel(engine, tokenizer, rules, load)


def eos_token_ids(folder: str, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Every token that ends an answer: those of generation_config.json, else the tokenizer's."""
    ids: int | list[int] | None = tokenizer.eos_token_id
    if (Path(folder) / "generation_config.json").exists():
        ids = GenerationConfig.from_pretrained(folder).eos_token_id or ids
    return frozenset([ids] if isinstance(ids, int) else ids or [])


def encode_prompts(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt], *, use_chat: bool) -> list[list[int]]:
    return [encode_prompt(tokenizer, prompt, use_chat=use_chat) for prompt in prompts]


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: Prompt, *, use_chat: bool) -> list[int]:
    """Token ids, in the chat template where the model has one and `use_chat` asks for it."""
    has_template = bool(tokenizer.chat_template)
    if prompt.messages is not None and not has_template:
        raise ValueError(f'prompt {prompt.index} is chat messages, but the model has no chat template. Use "prompt".')
    if prompt.text is not None and not (use_chat and has_template):
        return list(tokenizer(prompt.text)["input_ids"])
    messages = list(prompt.messages or ({"role": "user", "content": str(prompt.text)},))
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_lengths(prompts: Sequence[Prompt], token_ids: Sequence[Sequence[int]], max_context: int) -> None:
    """All prompts that do not fit, at once, before any is answered."""
    long = [(prompt.index, len(ids)) for prompt, ids in zip(prompts, token_ids, strict=True) if len(ids) >= max_context]
    if long:
        shown = ", ".join(f"prompt {index} has {length} tokens" for index, length in long[:4])
        raise ValueError(
            f"{shown}{', ...' if len(long) > 4 else ''}; prompt and answer must fit engine.max_context={max_context}. "
            "Raise engine.max_context or shorten the prompts."
        )


def warm_up(engine: Engine, token_ids: Sequence[Sequence[int]]) -> float:
    """The start of the first prompts once through the model, untimed: first calls load kernels. Returns the seconds."""
    start = time.perf_counter()
    engine.prefill([ids[:WARM_UP_TOKENS] for ids in token_ids])
    engine.decode(torch.zeros(len(token_ids), dtype=torch.long, device=engine.device)).cpu()
    return time.perf_counter() - start


def answer_prompts(
    context: RankContext, loaded: LoadedModel, token_ids: list[list[int]]
) -> tuple[list[dict[str, Any]], list[BatchResult]]:
    """Runs the prompts in batches, in order; answers to a file are written as each batch ends."""
    job, batches, outputs = context.job, [], []
    size = job.run.workload.batch_size
    for start in range(0, len(token_ids), size):
        batch = job.prompts[start : start + size]
        result = answer_batch(context, loaded, batch, token_ids[start : start + size])
        batches.append(result)
        lines = [output_line(prompt, answer) for prompt, answer in zip(batch, result.answers, strict=True)]
        outputs += lines
        if context.rank == 0 and job.run.prompts_file is not None:
            append_lines(job.output_path, lines)
            context.events.progress("answering", start + len(batch), len(token_ids), "prompts")
    return outputs, batches


def answer_batch(
    context: RankContext, loaded: LoadedModel, prompts: Sequence[Prompt], token_ids: list[list[int]]
) -> BatchResult:
    single = context.job.run.prompts_file is None
    sampler = Sampler(
        sampling_params(context.job.run.sampling),
        loaded.engine.vocabulary_shards,
        context.communicator,
        prompt_indices=[prompt.index for prompt in prompts],
        device=context.device,
    )
    result = generate_batch(
        loaded.engine,
        token_ids,
        sampler,
        loaded.tokenizer.backend_tokenizer,
        loaded.rules,
        on_text=lambda row, text: context.events.text(text) if single else None,
        on_prefill=lambda done, total: context.events.progress("prefill", done, total, "tokens") if single else None,
    )
    check_same_tokens(context, result.answers)
    return result


def sampling_params(sampling: SamplingConfig) -> SamplingParams:
    return SamplingParams(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed)


def check_same_tokens(context: RankContext, answers: Sequence[Answer]) -> None:
    """Ranks that drifted apart would go on to write nonsense, each its own; one small exchange a batch finds them."""
    digest = hash(tuple(tuple(answer.token_ids) for answer in answers)) % 2**31
    digests = context.communicator.all_gather(torch.tensor([float(digest)], dtype=torch.float64, device=context.device))
    if not bool((digests == digests[0]).all()):
        raise RuntimeError("ranks picked different tokens: the links or a card corrupt data. Check with task=probe.")


def output_line(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    return {"index": prompt.index, "prompt": prompt_key(prompt), **asdict(answer)}


def append_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Appends and flushes, so that a crash loses no answer that was done."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
