"""How many minutes a job asks for: its predicted work, its load and its start, with room."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.amounts import count
from launcher.config import RunConfig, TaskKind
from launcher.prompts import read_prompts
from launcher.timing.predict import Times

# Imports, process group, self-test of the links, warm-up and graphs: about 20 s where files are in memory, minutes on
# the first start of a node with shared disks.
START_SEC = 240.0
# SIGTERM comes so long before the limit, or up to a minute earlier; a run ends in seconds.
WARNING_SEC = 60
# A shared disk; local ones read four times as much.
LOAD_GB_PER_SEC = 1.0
GB = 1e9
# Predictions are of the middle of an answer and of cards that are not throttled.
MARGIN = 2.0
STEP_MIN = 5
# task=probe and task=calibrate take about a minute.
WITHOUT_MODEL_MIN = 10
WITHOUT_TIMES_MIN = 60
# Others' engines on the same requests, where times are not predicted.
BASELINE_MIN = 20


@dataclass(frozen=True)
class Duration:
    minutes: int
    why: str


def minutes_without_model(run: RunConfig) -> Duration:
    return Duration(WITHOUT_MODEL_MIN, f"task={run.task.kind.value} takes about a minute after its start.")


def minutes_of(run: RunConfig, times: Times | str, weights_bytes: int) -> Duration:
    """Minutes of a run whose answers all have their full length; `times` says why where none are predicted.

    Args:
        weights_bytes: of the checkpoints that are read.
    """
    if isinstance(times, str):
        return Duration(WITHOUT_TIMES_MIN, f"not predicted ({times}). Set it by --time.")
    requests, runs = num_requests(run), num_runs(run)
    work_sec = runs * requests_sec(run, times, requests)
    load_sec = weights_bytes / GB / LOAD_GB_PER_SEC
    baselines = len(run.bench.baselines)
    minutes = (START_SEC + WARNING_SEC + load_sec + MARGIN * work_sec) / 60 + BASELINE_MIN * baselines
    why = (
        f"{describe_work(run, requests, runs)} take {work_sec:.0f} s by {times.source}, taken {MARGIN:g} times; "
        f"{weights_bytes / GB:.1f} GB of weights {load_sec:.0f} s at {LOAD_GB_PER_SEC:g} GB/s; the start "
        f"{START_SEC:.0f} s" + (f"; {BASELINE_MIN} min for each baseline" if baselines else "") + ". No download."
    )
    return Duration(math.ceil(minutes / STEP_MIN) * STEP_MIN, why)


def describe_work(run: RunConfig, requests: int, runs: int) -> str:
    words = f"{count(requests, 'request')} of {run.workload.output_tokens} tokens at most"
    return words if runs == 1 else f"{runs} runs of {words}"


def num_requests(run: RunConfig) -> int:
    """Raises ConfigError: prompts_file cannot be read."""
    if run.task.kind == TaskKind.bench:
        return run.workload.num_requests or run.workload.batch_size
    return len(read_prompts(run))


def num_runs(run: RunConfig) -> int:
    return run.workload.repeats + run.workload.warm_up if run.task.kind == TaskKind.bench else 1


def requests_sec(run: RunConfig, times: Times, requests: int) -> float:
    batch_sec = run.workload.batch_size * run.workload.output_tokens / times.tokens_per_sec
    work_sec = math.ceil(requests / run.workload.batch_size) * batch_sec
    rate = run.workload.arrival_rate
    return max(work_sec, requests / rate) if rate else work_sec
