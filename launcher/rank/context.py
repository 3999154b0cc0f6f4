"""A rank that has joined its peers: device, process group, and a transport that has proved itself."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.events import EventWriter
from launcher.failures import describe_exception, write_first_failure
from launcher.job import Job
from launcher.processes.start import rank_log
from launcher.rank.transport import open_transport
from parallel.communicator import Communicator, TransportError
from parallel.shard import share_process_group
from parallel.transports.choice import PREFILL_BYTES, Range
from parallel.transports.selftest import DECODE_BYTES, Deadline
from parallel.units import GIB

# For NCCL to end its communicators, which takes a fraction of a second where all ranks do.
LEAVE_SEC = 10.0
# Torch's own limits, which say more, come first.
JOIN_GRACE_SEC = 5.0


@dataclass(frozen=True)
class RankContext:
    """What a task gets: the job, where it runs, and how it talks to its peers."""

    job: Job
    rank: int
    device: torch.device
    communicator: Communicator
    # What carries which sizes of message, smallest first.
    ranges: tuple[Range, ...]
    events: EventWriter
    # Seconds from where the parent took up the job to each step on the way to the first answer.
    startup: dict[str, float] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return Path(self.job.run_dir)

    def reached(self, step: str) -> None:
        self.startup[f"{step}_sec"] = self.job.elapsed_sec

    def abort(self, error: Exception) -> None:
        """See `abort_rank`."""
        abort_rank(self.job, self.rank, error)

    def transport_summary(self) -> dict[str, Any]:
        """Which transport carries which sizes, why, and what its self-test measured."""
        return {range_name(self.ranges, i): describe_range(each) for i, each in enumerate(self.ranges)}


def abort_rank(job: Job, rank: int, error: Exception) -> None:
    """Ends this rank from any thread, for when the main one hangs in a collective."""
    run_dir = Path(job.run_dir)
    write_first_failure(run_dir, describe_exception(error, rank, str(rank_log(run_dir, rank))))
    os._exit(1)


def range_name(ranges: Sequence[Range], i: int) -> str:
    """all_sizes, or up_to_N_bytes for each and then larger."""
    if len(ranges) == 1:
        return "all_sizes"
    limit = ranges[i].up_to_bytes
    return "larger" if limit is None else f"up_to_{limit}_bytes"


def describe_range(chosen: Range) -> dict[str, Any]:
    """What its self-test measured, of whichever range; null where it was not asked."""
    prefill_us = chosen.times_us.get(PREFILL_BYTES)
    return {
        "name": chosen.name,
        "reason": chosen.reason,
        "failed": list(chosen.failed),
        "decode_all_reduce_us": chosen.times_us.get(DECODE_BYTES),
        "prefill_gb_per_sec": None if prefill_us is None else PREFILL_BYTES / prefill_us / 1e3,
    }


@contextmanager
def joined_rank(
    job: Job, rank: int, events: EventWriter, startup: dict[str, float] | None = None
) -> Iterator[RankContext]:
    """Joins the process group, opens the transport and tests it; leaves the group at the end.

    `startup`: the times of steps before, as RankContext has them.
    """
    device = open_device(job, rank)
    deadline = limit_join(job, rank)
    try:
        join_process_group(job, device)
    finally:
        deadline.cancel()
    try:
        joined = {"joined_sec": job.elapsed_sec}
        choice = open_transport(job, device, partial(abort_rank, job, rank))
        startup = {**(startup or {}), **joined, "links_tested_sec": job.elapsed_sec}
        yield RankContext(job, rank, device, choice.communicator, choice.ranges, events, startup)
    except BaseException:
        # The error may hold an engine (leave_process_group). On a card the process ends without leaving.
        if device.type != "cuda":
            dist.destroy_process_group()
        raise
    leave_process_group()


def leave_process_group() -> None:
    """Nobody may hold an engine by now: from 2.26 on NCCL waits, for ever, until all graphs with its sums are gone. An
    engine refers to itself, and so goes when garbage is collected.

    Nor is a peer waited for that has gone already: what this rank has to tell must not be lost so late, and its
    process ends soon.
    """
    gc.collect()
    leaving = threading.Thread(target=dist.destroy_process_group, name="leave", daemon=True)
    leaving.start()
    leaving.join(LEAVE_SEC)


def open_device(job: Job, rank: int) -> torch.device:
    """This rank's device, its memory limited as the run asks.

    Raises:
        RuntimeError: the plan wants cards and this torch cannot use them.
    """
    card = job.placement.cards[rank]
    if card is None:
        # Where torchrun made this process a rank, torch was imported before OMP_NUM_THREADS was set.
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"NVML lists cards, but torch {torch.__version__} cannot use CUDA. Install a CUDA build of torch, or "
            "run on the CPU with hardware=cpu."
        )
    device = torch.device("cuda", card)
    # What a load leaves between weights can then be given back and used again: 8.8 of 48 GiB stayed unused without it
    # (70B in 4 bits on an H200).
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    torch.cuda.set_device(device)
    # cuDNN's attention builds a plan for each new length: 40 ms a decode step, measured on an H200 with torch 2.11.
    torch.backends.cuda.enable_cudnn_sdp(False)
    limit_bytes = allocator_limit(job, rank)
    if limit_bytes is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)
    return device


def allocator_limit(job: Job, rank: int) -> float | None:
    """Bytes that torch may take where limits.card_memory_gib is set: what a card of that size leaves it."""
    limit_gib = job.run.limits.card_memory_gib
    if limit_gib is None:
        return None
    if job.plan is None:
        return limit_gib * GIB
    # Of the budget the context and the communicator are not torch's.
    card = job.plan.cards[rank]
    return min(card.budget_bytes, limit_gib * GIB) - card.lines["context"] - card.lines["communicator"]


def limit_join(job: Job, rank: int) -> Deadline:
    """Ends this rank where the first never serves the store, as one that hangs in its driver: torch connects to the
    socket that the parent has opened, and waits for an answer without a limit (2.13)."""
    limit_sec = job.run.timeouts.collective_sec
    error = TransportError(
        f"rank 0 did not answer rank {rank} for {limit_sec:g} s (timeouts.collective_sec): it hangs before it has "
        f"joined. Its log may say where: {rank_log(Path(job.run_dir), 0)}"
    )
    return Deadline(limit_sec + JOIN_GRACE_SEC, error, partial(abort_rank, job, rank))


def join_process_group(job: Job, device: torch.device) -> None:
    """Makes the default group, through which transports open theirs, and lets DeepSpeed use it."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=job.run.timeouts.collective_sec))
    share_process_group(device)
