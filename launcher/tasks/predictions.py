"""task=predictions: one model, many workloads, each measured as task=bench does and set beside what was predicted.

Each workload has the engine that a run of it would have, but the model is loaded once. What was measured is written
after every one, as JSON lines and as Markdown, so that a run that is ended keeps it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

from transformers import PreTrainedModel

from launcher.finished import keep_finished
from launcher.plan.grid import GridPoint, point_run
from launcher.rank.context import RankContext
from launcher.report.accuracy import PAGE_FILE, POINTS_FILE, Row, point_row, summarise_errors
from launcher.report.accuracy_text import accuracy_page
from launcher.tasks.bench import Bench, open_agreement
from launcher.tasks.fused_rows import choose_fused_rows
from launcher.tasks.generate import append_lines
from launcher.tasks.loaded import open_engine
from launcher.tasks.measure import kernels, memory
from launcher.tasks.summary import summarise
from launcher.tasks.weights import give_back, load_sharded_model
from parallel.engine.arrivals import Agree
from parallel.engine.engine import Engine
from parallel.engine.limits import EngineLimits
from parallel.engine.step_timer import time_steps


def run_predictions(context: RankContext) -> dict[str, Any]:
    """Results: {"predictions": {"points": [...], "summary": ...}, ...}, of rank 0's clock.

    Raises:
        RuntimeError: ranks picked different tokens.
    """
    job = context.job
    assert job.plan is not None, "the parent plans a model for this task"
    fused_rows = choose_fused_rows(context)
    module, load = load_sharded_model(context, fused_rows)
    agree, rows, about = open_agreement(context), list[Row](), dict[str, Any]()
    for _, points in groupby(job.grid, engine_key):
        for row, of_engine in measure_group(context, module, list(points), agree):
            rows.append(row)
            about |= of_engine
            keep_rows(context, rows)
            context.events.progress("measuring", len(rows), len(job.grid), "workloads")
    return {
        "transport": context.transport_summary(),
        "load": asdict(load),
        "fused_rows": None if fused_rows is None else asdict(fused_rows),
        **about,
        "predictions": points_and_errors(rows),
    }


def engine_key(point: GridPoint) -> tuple[int, int, int | None] | None:
    """What the engine of a workload depends on; None where it has none."""
    plan = point.plan
    return None if plan is None else (plan.batch_size, plan.max_context, plan.prefill_chunk_while_decoding)


def measure_group(
    context: RankContext, module: PreTrainedModel, points: list[GridPoint], agree: Agree
) -> Iterator[tuple[Row, dict[str, Any]]]:
    """The row of each of `points`, for which one engine does, or none, and what is known of that engine."""
    job, plan = context.job, points[0].plan
    if plan is None:
        yield from ((point_row(point, job.run.workload.output_tokens, None), {}) for point in points)
        return
    contexts = [replace(context, job=replace(job, run=point_run(job.run, each))) for each in points]
    engine = open_engine(contexts[0], plan, module)
    for point, own in zip(points, contexts, strict=True):
        measured = measure_point(own, engine, point, agree)
        about = {"kernels": kernels(engine), "memory": memory(context.device, engine)}
        yield point_row(point, job.run.workload.output_tokens, measured), about
    del engine
    give_back(context.device)


def measure_point(context: RankContext, engine: Engine, point: GridPoint, agree: Agree) -> Row:
    """What task=bench measures of the workload, under the names that are predicted."""
    run = context.job.run
    assert context.job.shape is not None
    bench = Bench(context, engine, point.prompt_tokens, context.job.shape.vocab_size, agree)
    warm_up(bench, run.workload.output_tokens)
    found = summarise([bench.measure(number) for number in range(run.workload.repeats)])
    contexts = [point.prompt_tokens + run.workload.output_tokens // 2] * point.batch_size
    context.communicator.barrier()
    steps = time_steps(engine, contexts, max(1, run.engine.comm_share_steps), context.communicator)
    return found | {"itl_ms": found["tpot_ms"]["p50"], "step_ms": statistics.median(steps)}


def warm_up(bench: Bench, output_tokens: int) -> None:
    """Twice: the first time passes are captured, the second replays them, which takes longer than later ones (1.5 ms
    for 32 layers, measured on an H200)."""
    engine, prompt_tokens = bench.engine, bench.num_prompt_tokens
    for time in ("first", "second"):
        prompts = bench.prompts(warm_up_prompts(engine.limits, prompt_tokens), f"warm up, {time} time")
        bench.answer(prompts, min(output_tokens, warm_up_tokens(engine.limits, prompt_tokens)))
        engine.record_passes()


def warm_up_prompts(limits: EngineLimits, prompt_tokens: int) -> int:
    """Prompts that make a pass of every size that a batch has: first calls of a size choose and load kernels."""
    tokens = limits.chunk(is_decoding=False) + limits.chunk(is_decoding=True)
    return min(limits.batch_size, max(2, math.ceil(tokens / prompt_tokens)))


def warm_up_tokens(limits: EngineLimits, prompt_tokens: int) -> int:
    """Of each answer, so that the first are still under way while a prompt is read in passes beside them."""
    return 2 + math.ceil(prompt_tokens / limits.chunk(is_decoding=True))


def points_and_errors(rows: list[Row]) -> dict[str, Any]:
    return {"points": rows, "summary": summarise_errors(rows)}


def keep_rows(context: RankContext, rows: list[Row]) -> None:
    """Rank 0 adds the newest to the file of points, keeps all for the report of a run that is ended, and writes their
    page."""
    if context.rank != 0:
        return
    append_lines(context.run_dir / POINTS_FILE, [rows[-1]])
    num = {"workloads": len(rows), "wanted_workloads": len(context.job.grid)}
    keep_finished(context.run_dir, num | {"predictions": points_and_errors(rows)})
    run, placement = context.job.run, context.job.placement
    title = f"{run.model.name}, {placement.world_size} x {placement.names[0]}"
    (context.run_dir / PAGE_FILE).write_text(accuracy_page(title, rows), encoding="utf-8")
