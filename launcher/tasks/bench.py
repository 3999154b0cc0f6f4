"""task=bench: the engine under a workload of random prompts, all answers of full length; see WorkloadConfig."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from launcher.finished import keep_finished
from launcher.rank.context import RankContext
from launcher.tasks.bandwidth import bandwidth, streamed_floors
from launcher.tasks.breakdown import step_breakdown
from launcher.tasks.copy_rates import copy_bandwidth, pinned_copy_bandwidth
from launcher.tasks.generate import check_same_tokens
from launcher.tasks.loaded import load_model
from launcher.tasks.measure import communication
from launcher.tasks.offload import streaming
from launcher.tasks.prefill_breakdown import prefill_breakdown
from launcher.tasks.requests import arrival_times, num_requests, run_prompts
from launcher.tasks.serving import serving
from launcher.tasks.speculated import Steps, speculated
from launcher.tasks.summary import MeasuredRun, summarise
from launcher.tasks.tokens import text_tokenizer
from launcher.tasks.tree_passes import time_tree_passes
from parallel.engine.answer import StopRules
from parallel.engine.arrivals import Agree, alone
from parallel.engine.chunk_timer import chunk_lengths
from parallel.engine.engine import Engine
from parallel.engine.generate import Prompt, Result, generate
from parallel.engine.speculation.acceptance import join
from parallel.engine.step_timer import time_steps


@dataclass(frozen=True)
class Bench:
    """An engine and the workload it is measured on."""

    context: RankContext
    engine: Engine
    num_prompt_tokens: int
    vocab_size: int
    agree: Agree

    def measure(self, number: int) -> MeasuredRun:
        """Run `number` of the workload: the same requests for the same number on every rank, new ones for each."""
        workload = self.context.job.run.workload
        prompts = self.arriving(self.prompts(num_requests(workload), f"run {number}"))
        started = time.time()
        result, sec = self.answer(prompts, workload.output_tokens)
        ended = time.time()
        check_same_tokens(self.context, result.answers)
        first = self.prompts(workload.batch_size, f"prefill {number}")
        _, prefill_sec = self.answer(first, 1)
        return MeasuredRun(
            result.ttft_ms,
            result.token_ms,
            sum(len(answer.token_ids) for answer in result.answers),
            sec,
            len(first) * self.num_prompt_tokens / prefill_sec,
            result.acceptance,
            result.step_ms,
            result.plans,
            result.requests,
            (started, ended),
        )

    def prompts(self, num: int, name: str) -> list[Prompt]:
        ids = run_prompts(self.context.job.run, name, num, self.num_prompt_tokens, self.vocab_size)
        return [Prompt(index, each) for index, each in enumerate(ids)]

    def arriving(self, prompts: list[Prompt]) -> list[Prompt]:
        """The prompts at their times, where the workload has any: the same in every run."""
        run = self.context.job.run
        if run.workload.arrival_rate is None:
            return prompts
        times = arrival_times(len(prompts), run.workload.arrival_rate, run.sampling.seed)
        return [replace(prompt, arrival_sec=sec) for prompt, sec in zip(prompts, times, strict=True)]

    def answer(self, prompts: list[Prompt], num_tokens: int) -> tuple[Result, float]:
        """Answers of `num_tokens` each, and the seconds from a common start."""
        self.context.communicator.barrier()
        start = time.perf_counter()
        result = generate(self.engine, prompts, text_tokenizer(None), StopRules(num_tokens), agree=self.agree)
        return result, time.perf_counter() - start


def run_bench(context: RankContext) -> dict[str, Any]:
    """Loads the model and measures it; the same measurements on all ranks, of which the first's are reported.

    Raises:
        RuntimeError: ranks picked different tokens.
    """
    job = context.job
    assert job.plan is not None and job.shape is not None, "the parent plans a model for this task"
    num_prompt_tokens = job.run.num_prompt_tokens
    assert num_prompt_tokens is not None
    copy_bytes_per_sec = copy_bandwidth(context.device)
    pinned_copy = pinned_copy_bandwidth(context.device) if job.plan.offload else None
    loaded = load_model(context, job.plan, None)
    bench = Bench(context, loaded.engine, num_prompt_tokens, job.shape.vocab_size, open_agreement(context))
    warm_up_sec = warm_up(bench)
    context.reached("ready")
    loaded.engine.record_passes()
    runs = measure_runs(bench)
    contexts = [num_prompt_tokens + job.run.workload.output_tokens // 2] * job.run.workload.batch_size
    step = decode_step(context, bench.engine, contexts)
    step_ms = step["decode_step_ms"]["measured"]
    offload = streaming(bench.engine, contexts, step_ms, pinned_copy)
    streamed_ms = streamed_floors(offload, job.plan.offload)
    return {
        "workload": asdict(job.run.workload) | {"prompt_tokens": num_prompt_tokens},
        "warm_up_sec": warm_up_sec,
        **summarise(runs),
        "requests": serving(runs, job.run.workload),
        "speculation": speculated(context, loaded, join_steps(runs), contexts, offload),
        "generated_tokens": sum(run.output_tokens for run in runs),
        "generation": [run.span for run in runs],
        **step,
        "offload": offload,
        **bandwidth(bench.engine, contexts, step_ms, copy_bytes_per_sec, streamed_ms),
        "passes": time_tree_passes(context, bench.engine, contexts, pinned_copy),
        "breakdown": step_breakdown(bench.engine, contexts, context.communicator),
        "prefill_breakdown": prefill_breakdown(
            bench.engine, chunk_lengths(bench.engine.limits, num_prompt_tokens), context.communicator
        ),
        **loaded.results(context),
    }


def warm_up(bench: Bench) -> float:
    """Runs that are not measured; returns their seconds."""
    start, num = time.perf_counter(), bench.context.job.run.workload.warm_up
    for number in range(num):
        bench.measure(-1 - number)
        bench.context.events.progress("warming up", number + 1, num, "runs")
    return time.perf_counter() - start


def measure_runs(bench: Bench) -> list[MeasuredRun]:
    """The measured runs; those so far are kept as they end."""
    context, num, runs = bench.context, bench.context.job.run.workload.repeats, []
    for number in range(num):
        runs.append(bench.measure(number))
        if context.rank == 0:
            keep_finished(context.run_dir, {"repeats": len(runs), "wanted_repeats": num} | summarise(runs))
        context.events.progress("measuring", number + 1, num, "runs")
    return runs


def join_steps(runs: Sequence[MeasuredRun]) -> Steps:
    return Steps(
        join(run.acceptance for run in runs),
        [ms for run in runs for ms in run.step_ms],
        sum((run.plans for run in runs), Counter()),
    )


def open_agreement(context: RankContext) -> Agree:
    """Rank 0 decides and tells the others from host to host, where the device goes on meanwhile."""
    if context.communicator.world_size == 1:
        return alone
    group = dist.new_group(backend="gloo")

    def agree(decide: Callable[[], int]) -> int:
        decision = torch.tensor([decide() if context.rank == 0 else 0])
        dist.broadcast(decision, src=0, group=group)
        return int(decision)

    return agree


def decode_step(context: RankContext, engine: Engine, contexts: list[int]) -> dict[str, Any]:
    """The step of full rows timed by itself: with all-reduces and, where that is measured, without."""
    measured = communication(context, engine, contexts)
    if "decode_step_ms" in measured:
        return measured
    num_steps = max(1, context.job.run.engine.comm_share_steps)
    times = time_steps(engine, contexts, num_steps, context.communicator)
    return measured | {"decode_step_ms": {"measured": statistics.median(times), "without_all_reduce": None}}
