"""Whether a transport's all_reduce_add_norm is right, and how fast it is: of one kernel, or of its two steps."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.kernels import reference
from parallel.transports.selftest import DECODE_BYTES, Timing, agreed_number, time_calls, timing_of

# One row is a token of a 70B.
HIDDEN_SIZE = DECODE_BYTES // 2
NORM_BYTES = tuple(DECODE_BYTES * rows for rows in (1, 2, 4, 8, 16, 32))
# Rows of other models, some with threads to spare.
HIDDEN_SIZES = (64, 2560, 5120, HIDDEN_SIZE, 2 * HIDDEN_SIZE)
EPS = 1e-5
REPEATS = 20


def find_wrong_norms(communicator: Communicator, device: torch.device) -> str:
    """Which rows came out wrong, if any. Goes through all of them, so that ranks stay in step."""
    shapes = [(rows, hidden_size) for hidden_size in HIDDEN_SIZES for rows in (1, 3, 8, 32)]
    wrong = [shape for shape in shapes if not norms_right(communicator, device, *shape)]
    return f"gave wrong sums or norms of {wrong[0][0]} x {wrong[0][1]} numbers" if wrong else ""


def norms_right(communicator: Communicator, device: torch.device, rows: int, hidden_size: int) -> bool:
    """Whether, on fresh whole numbers, the residual is exact and its norm is plain torch's but for two roundings."""
    seed = agreed_number(communicator, device, 0, 2**20)
    generator = torch.Generator().manual_seed(seed)
    shape = (communicator.world_size + 1, rows, hidden_size)
    # Sums over four ranks and the residual stay below 256: every number up to that is one of bfloat16.
    *updates, residual = torch.randint(-50, 51, shape, generator=generator).to(device).bfloat16()
    weight = (torch.rand(hidden_size, generator=generator) + 0.5).to(device).bfloat16()
    total = torch.stack(updates).float().sum(dim=0) + residual.float()
    # On a copy: it is a part of a larger tensor.
    found = residual.clone()
    normed = communicator.all_reduce_add_norm(updates[communicator.rank].clone(), found, weight, EPS)
    return torch.equal(found.float(), total) and near(normed, reference.rms_norm(total, weight.float(), EPS))


def near(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.float(), expected, rtol=2**-7, atol=1e-6)


def time_norm(communicator: Communicator, device: torch.device, num_bytes: int) -> Timing:
    """Of rows of `HIDDEN_SIZE`, as time_all_reduce times a sum alone."""
    rows = num_bytes // DECODE_BYTES
    update, residual = (torch.zeros(rows, HIDDEN_SIZE, dtype=torch.bfloat16, device=device) for _ in range(2))
    weight = torch.ones(HIDDEN_SIZE, dtype=torch.bfloat16, device=device)
    call = partial(communicator.all_reduce_add_norm, update, residual, weight, EPS)
    times = time_calls(communicator, call, device, captured=True, repeats=REPEATS)
    return timing_of(num_bytes, times, exact=norms_right(communicator, device, rows, HIDDEN_SIZE))
