"""Where the time of a decode step goes, part by part: its kernels as torch's profiler saw them, sorted by name.

On a CPU, which has no kernels, its operators. Names do not tell the head from other linears, nor sampling from other
small kernels, but order does: both come after the step's last norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from parallel.communicator import Communicator
from parallel.engine.engine import Engine
from parallel.engine.step_timer import prepared_step

# Steps that are looked at. One before them, in which ranks wait for each other to start, is dropped.
NUM_STEPS = 5
# Names contain one of these, in lower case; the first part that fits has the kernel. So a norm in one kernel with the
# sum before it counts as all-reduce, and an activation in one with the product before it as linears.
PARTS = {
    "all_reduce": ("nccl", "gloo", "reduce_bfloat16", "reduce_float16", "reduce_float32", "gather_bytes"),
    "attention": ("paged_attention", "::attend", "flash", "fmha", "scaled_dot_product"),
    "norms": ("rms_norm", "rsqrt"),
    "rotary": ("rotary",),
    "activation": ("silu",),
    "linears": (
        *("w4a16", "w8a16", "wide", "dequantize_w", "dequantize_h", "tinygemm"),
        *("pack_four_bits", "pack_eight_bits", "round_groups"),
        *("gemm", "gemv", "nvjet", "cutlass", "splitk"),
        *("aten::linear", "aten::mm", "aten::addmm", "aten::matmul"),
    ),
}
OTHER = "other"
NAMES = (*PARTS, "head", "sampling", OTHER)
# Copies of streamed layers, which go on beside the kernels, also from one step to the next.
COPIES = "memcpy htod"
# Of the kernels in `other`, those with the most time are listed.
NUM_LISTED = 12


@dataclass(frozen=True)
class Piece:
    """A kernel, or an operator on a CPU: its name, and its start and time in us."""

    name: str
    start_us: float
    us: float


def step_breakdown(engine: Engine, contexts: Sequence[int], communicator: Communicator) -> dict[str, Any]:
    """Of a decode step of sequences with `contexts` tokens; on all ranks at once. See `break_down_steps`."""
    with prepared_step(engine, contexts, communicator) as run:
        run()
        communicator.barrier()
        return break_down_steps(profile_steps(run, engine.device))


def profile_steps(run: Callable[[], None], device: torch.device, num_steps: int = NUM_STEPS) -> list[Piece]:
    """What `num_steps` + 1 calls of `run`, queued one after another, did on `device`, by start."""
    on_card = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as profiler:
        for _ in range(num_steps + 1):
            run()
        if on_card:
            torch.cuda.synchronize(device)
    wanted = DeviceType.CUDA if on_card else DeviceType.CPU
    events = [each for each in profiler.events() or () if each.device_type == wanted and each.cpu_parent is None]
    # Gloo works in a thread of its own, for which the operator that asked it waits.
    events = [each for each in events if not each.name.startswith("c10d::")]
    pieces = (Piece(each.name, each.time_range.start, each.time_range.elapsed_us()) for each in events)
    return sorted(pieces, key=lambda piece: piece.start_us)


def break_down_steps(pieces: Sequence[Piece], num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """Microseconds a step and share of each part, of `num_steps` steps and one before them.

    `between` is the time in which nothing ran: gaps, which the profiler widens, on a CPU Python and waiting, and where
    layers are streamed waiting for copies, or for what the host computes. `host_copies_us` is what copies took, beside
    all else. `problem` says why there is nothing, where the pieces cannot be told apart by step.
    """
    copies_us = sum(piece.us for piece in pieces if COPIES in piece.name.lower()) / (num_steps + 1)
    pieces = [piece for piece in pieces if COPIES not in piece.name.lower()]
    steps = split_steps(pieces, num_steps)
    if steps is None:
        return {"parts": None, "problem": problem_text(pieces, num_steps)}
    parts: dict[str, float] = dict.fromkeys(NAMES, 0.0)
    others: dict[str, float] = {}
    for step in map(one_after_another, steps):
        for piece, part in zip(step, parts_of([piece.name for piece in step]), strict=True):
            parts[part] += piece.us / num_steps
            if part == OTHER:
                others[piece.name] = others.get(piece.name, 0.0) + piece.us / num_steps
    end = max(piece.start_us + piece.us for piece in steps[-1])
    step_us = (end - steps[0][0].start_us) / num_steps
    parts["between"] = max(0.0, step_us - sum(parts.values()))
    return {
        "step_us": step_us,
        "parts": {name: {"us": us, "share": us / step_us} for name, us in parts.items()},
        "other_us": dict(sorted(others.items(), key=lambda item: -item[1])[:NUM_LISTED]),
        "host_copies_us": copies_us,
        "problem": None,
    }


def split_steps(pieces: Sequence[Piece], num_steps: int) -> list[Sequence[Piece]] | None:
    """Those of each of `num_steps` steps that followed another; None where steps did not do equally much."""
    size = len(pieces) // (num_steps + 1)
    if not pieces or len(pieces) % (num_steps + 1):
        return None
    return [pieces[start : start + size] for start in range(size, len(pieces), size)]


def one_after_another(pieces: Sequence[Piece]) -> list[Piece]:
    """Each from where all before it had ended: kernels that start early have until then only waited for these."""
    found, end_us = [], 0.0
    for piece in pieces:
        start_us, end_us = max(piece.start_us, end_us), max(piece.start_us + piece.us, end_us)
        found.append(Piece(piece.name, start_us, end_us - start_us))
    return found


def problem_text(pieces: Sequence[Piece], num_steps: int) -> str:
    return f"the profiler saw {len(pieces)} kernels in {num_steps + 1} equal steps"


def parts_of(names: Sequence[str]) -> list[str]:
    """The part of each piece of one step, in order."""
    parts = [part_of(name) for name in names]
    last_norm = max((place for place, part in enumerate(parts) if part == "norms"), default=len(parts))
    late = ["head" if part == "linears" else "sampling" for part in parts[last_norm + 1 :]]
    return [*parts[: last_norm + 1], *late]


def part_of(name: str, parts: Mapping[str, Sequence[str]] = PARTS) -> str:
    lower = name.lower()
    return next((part for part, patterns in parts.items() if any(text in lower for text in patterns)), OTHER)
