"""Parts of many prompts attend at once on a card: what they do one by one, in as many launches for many as for two."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from parallel.engine.limits import GATHERED_KEYS
from parallel.engine.prefill.part_attention import attend_parts
from parallel.engine.sequence import Part, TokenSequence
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.pages import FP8, PagedKV, pages_for
from tests.parallel.paged import gather

pytestmark = pytest.mark.gpu
BF16, F16 = torch.bfloat16, torch.float16
Places = tuple[tuple[int, int], ...]
# Of each part: where it starts and ends in its prompt.
PASSES: dict[str, Places] = {
    "fresh": ((0, 512), (0, 1), (0, 64), (0, 300)),
    "continued": ((1024, 1300), (64, 65), (500, 900)),
    "mixed": ((700, 1212), (0, 130), (64, 190), (0, 1), (2048, 2049), (0, 700)),
    "single": ((64, 65), (0, 1), (1999, 2000), (640, 641)),
    "many": tuple((64 * (row % 3), 64 * (row % 3) + 1 + row) for row in range(40)),
    "beyond the budget": ((8000, 8100), (0, 90), (4000, 4100), (5000, 5001), (9000, 9200)),
}
SCALE = 0.09
NUM_CALLS = 20


@dataclass(frozen=True)
class Pass:
    parts: list[Part]
    query: Tensor
    cache: PagedKV

    def attend(self, max_keys: int) -> Tensor:
        return attend_parts(self.parts, SCALE, max_keys)(self.query, self.cache)


def make_pass(places: Places, kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, kv: torch.dtype) -> Pass:
    """Keys and values of all sequences in shuffled pages, NaN beyond their ends."""
    counts = [pages_for(end) for _, end in places]
    order = random.sample(range(1, 1 + sum(counts)), sum(counts))
    parts = [
        Part(TokenSequence(row, [0] * end, 1, pages=[order.pop() for _ in range(pages_for(end))]), start, end)
        for row, (start, end) in enumerate(places)
    ]
    stored = torch.randn(2, 1 + sum(counts), kv_heads, PAGE_SIZE, head_dim, device="cuda")
    stored[:, 0] = torch.nan
    for part in parts:
        stored[:, part.sequence.pages[-1], :, (part.end - 1) % PAGE_SIZE + 1 :] = torch.nan
    # A slice of wider rows, as the projection's output may be.
    query = torch.randn(sum(map(len, parts)), kv_heads * (group + 2), head_dim, device="cuda").to(dtype)
    return Pass(parts, query[:, : kv_heads * group], PagedKV(*stored.to(kv)))


def worst_error(of: Pass, output: Tensor) -> float:
    """Of first, middle and last rows of each part beside float64, in units of the mean size of exact results."""
    errors, row, group = [], 0, of.query.shape[1] // of.cache.keys.shape[1]
    for part in of.parts:
        pages = torch.tensor(part.sequence.pages)
        keys, values = (gather(stored, pages, part.end) for stored in (of.cache.keys, of.cache.values))
        for at in {0, len(part) // 2, len(part) - 1}:
            seen = part.start + at + 1
            query = of.query[row + at].double().unflatten(0, (-1, group))
            weights = (torch.einsum("kgd,ktd->kgt", query, keys[:, :seen]) * SCALE).softmax(-1)
            exact = torch.einsum("kgt,ktd->kgd", weights, values[:, :seen]).flatten(0, 1)
            errors.append(float((output[row + at].double() - exact).abs().max() / exact.abs().mean()))
        row += len(part)
    return max(errors) if all(error == error for error in errors) else float("inf")


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "dtype", "kv", "allowed"),
    [
        (4, 8, 128, BF16, BF16, 0.08),
        (2, 4, 64, BF16, FP8, 0.08),
        (8, 1, 128, F16, F16, 0.02),
        (1, 5, 80, BF16, BF16, 0.08),
    ],
)
def test_many_at_once_are_as_right_as_one_by_one(
    name: str, kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, kv: torch.dtype, allowed: float
) -> None:
    made = make_pass(PASSES[name], kv_heads, group, head_dim, dtype, kv)
    at_once, one_by_one = made.attend(GATHERED_KEYS), made.attend(0)
    assert at_once.shape == one_by_one.shape == made.query.shape and at_once.isfinite().all()
    errors = worst_error(made, at_once), worst_error(made, one_by_one)
    assert max(errors) < allowed, errors
    # Both round results to the activations' type, after sums in other orders.
    apart = (at_once.double() - one_by_one.double()).abs().max() / one_by_one.double().abs().mean()
    assert float(apart) < allowed


def launches(made: Pass, max_keys: int) -> int:
    """Kernels and copies of a layer, but for what a pass prepares once."""
    attend = attend_parts(made.parts, SCALE, max_keys)
    attend(made.query, made.cache)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        attend(made.query, made.cache)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.profiler.DeviceType.CUDA for event in profiler.events())


def queue_and_card_us(made: Pass, max_keys: int) -> tuple[float, float]:
    """Of a layer: for the host to queue it, and in all."""
    attend = attend_parts(made.parts, SCALE, max_keys)
    attend(made.query, made.cache)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(NUM_CALLS):
        attend(made.query, made.cache)
    queued = time.perf_counter() - start
    torch.cuda.synchronize()
    return queued / NUM_CALLS * 1e6, (time.perf_counter() - start) / NUM_CALLS * 1e6


@pytest.mark.parametrize("kv", [BF16, FP8])
def test_launches_do_not_grow_with_the_parts(kv: torch.dtype) -> None:
    counts = {}
    for num_parts in (2, 8, 64):
        places = tuple((64 * (row % 2), 64 * (row % 2) + 32) for row in range(num_parts))
        made = make_pass(places, 4, 8, 128, BF16, kv)
        counts[num_parts] = launches(made, GATHERED_KEYS)
        for max_keys in (GATHERED_KEYS, 0):
            queue_us, whole_us = queue_and_card_us(made, max_keys)
            print(
                f"{kv} {num_parts} parts, {max_keys=}: {launches(made, max_keys)} launches, "
                f"{queue_us:.0f} us to queue, {whole_us:.0f} us in all"
            )
    assert counts[2] == counts[8] == counts[64] <= 8, counts
