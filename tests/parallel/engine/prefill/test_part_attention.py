"""Many parts of prompts attend at once: to what each has in its pages, fresh, continued or after a head that is shared,
in as many launches for many parts as for two."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.communicator import Communicator
from parallel.engine.answer import StopRules
from parallel.engine.generate import generate
from parallel.engine.limits import EngineLimits
from parallel.engine.prefill import part_attention
from parallel.engine.prefill.part_attention import attend_parts, group_parts
from parallel.engine.sequence import Part, TokenSequence
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.pages import FP8, PagedKV, pages_for
from tests.parallel.engine.prefill.test_overlap import pass_states
from tests.parallel.paged import gather
from tests.parallel.ranks import demo_tokenizer, make_engine, numbered, run_on_ranks
from tests.parallel.small_models import prompts_of

# Of each part: where it starts and ends in its prompt.
MIXED = ((0, 70), (64, 65), (3, 131), (0, 1), (128, 200), (0, 64))
SINGLE = ((64, 65), (128, 129), (0, 1))
SCALE = 0.25


def make_parts(places: tuple[tuple[int, int], ...], num_pages: int) -> list[Part]:
    """In shuffled pages; the second and the last of three parts or more have their first page in common."""
    order = random.sample(range(1, num_pages), num_pages - 1)
    parts = [
        Part(TokenSequence(row, [0] * end, 1, pages=[order.pop() for _ in range(pages_for(end))]), start, end)
        for row, (start, end) in enumerate(places)
    ]
    if len(parts) > 2:
        parts[-1].sequence.pages[0] = parts[1].sequence.pages[0]
    return parts


def make_cache(parts: list[Part], num_pages: int, kv_heads: int, dtype: torch.dtype) -> PagedKV:
    """Random in the slots of the parts' sequences, NaN in all others."""
    shape = (num_pages, kv_heads, PAGE_SIZE, 16)
    is_filled = torch.zeros(num_pages, 1, PAGE_SIZE, 1, dtype=torch.bool)
    for part in parts:
        for position in range(part.end):
            is_filled[part.sequence.pages[position // PAGE_SIZE], :, position % PAGE_SIZE] = True
    return PagedKV(*(torch.randn(shape).masked_fill(~is_filled, math.nan).to(dtype) for _ in range(2)))


def exact(query: Tensor, parts: list[Part], cache: PagedKV) -> Tensor:
    """In float64, row by row and head by head."""
    found, row, group = [], 0, query.shape[1] // cache.keys.shape[1]
    for part in parts:
        pages = torch.tensor(part.sequence.pages)
        for position in range(part.start, part.end):
            keys, values = (gather(stored, pages, position + 1) for stored in (cache.keys, cache.values))
            for head in range(query.shape[1]):
                weights = (keys[head // group] @ query[row, head].double() * SCALE).softmax(0)
                found.append(weights @ values[head // group])
            row += 1
    return torch.stack(found).view(query.shape)


@pytest.mark.parametrize("places", [MIXED, SINGLE, MIXED[:1]])
@pytest.mark.parametrize("max_keys", [0, 140, 8192])
@pytest.mark.parametrize(("dtype", "kv_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, FP8)])
@pytest.mark.parametrize(("kv_heads", "group"), [(2, 4), (3, 1)])
def test_each_part_sees_its_own_past_and_nothing_else(
    places: tuple[tuple[int, int], ...],
    max_keys: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    kv_heads: int,
    group: int,
) -> None:
    parts = make_parts(places, 20)
    cache = make_cache(parts, 20, kv_heads, kv_dtype)
    query = torch.randn(sum(map(len, parts)), kv_heads * group, 16).to(dtype)
    found = attend_parts(parts, SCALE, max_keys)(query, cache)
    assert found.shape == query.shape and found.dtype == dtype
    allowed = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found.double(), exact(query, parts, cache), rtol=allowed, atol=allowed)


def test_neighbours_are_together_while_they_attend_to_few_enough() -> None:
    parts = [Part(TokenSequence(row, [0] * end, 1), 0, end) for row, end in enumerate((30, 50, 21, 200, 1, 99, 1))]
    grouped = {limit: [[part.end for part in each] for each in group_parts(parts, limit)] for limit in (0, 100, 1000)}
    assert grouped == {
        0: [[30], [50], [21], [200], [1], [99], [1]],
        100: [[30, 50], [21], [200], [1, 99], [1]],
        1000: [[30, 50, 21, 200, 1, 99, 1]],
    }


@pytest.mark.parametrize(("context", "batch", "expected"), [(100, 4, 400), (1000, 64, 8192), (20000, 8, 20000)])
def test_as_much_is_gathered_as_one_sequence_may_have_or_all(context: int, batch: int, expected: int) -> None:
    assert EngineLimits(context, batch, 64).gathered_keys == expected


class Launches(TorchDispatchMode):
    """Counts what would be kernels on a card: operators that return memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket is not torch.ops.aten._unsafe_view:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kv_dtype", "expected"), [(torch.float32, 3), (FP8, 5)])
def test_launches_of_a_layer_do_not_grow_with_the_parts(
    monkeypatch: pytest.MonkeyPatch, kv_dtype: torch.dtype, expected: int
) -> None:
    """Attention of ranges is one on a card."""
    monkeypatch.setattr(part_attention, "ranges_attention", lambda query, *others: query.clone())
    counts = []
    for num_parts in (2, 40):
        parts = make_parts(((0, 3), (64, 66)) * (num_parts // 2), 100)
        cache = make_cache(parts, 100, 2, kv_dtype)
        query = torch.randn(sum(map(len, parts)), 4, 16)
        attend = attend_parts(parts, SCALE, 8192)
        attend(query, cache)
        with Launches() as launches:
            attend(query, cache)
        counts.append(len(launches.names))
    assert counts == [expected, expected]


# A cut that halves passes falls within these, and between them.
PASSES = (((0, 20), (5, 31), (17, 18), (0, 7)), ((8, 9), (16, 17), (0, 1)), ((0, 13), (2, 40)))


def spied(calls: list[int]) -> Callable[..., Tensor]:
    inner = part_attention.ranges_attention

    def spy(query: Tensor, keys: Tensor, values: Tensor, query_bounds: Tensor, *others: Any) -> Tensor:
        calls.append(len(query_bounds) - 1)
        return inner(query, keys, values, query_bounds, *others)

    return spy


def states_and_answers(
    communicator: Communicator, folder: Path, max_keys: int | None
) -> tuple[list[Tensor], list[list[int]], list[int]]:
    """States of passes; answers to prompts that are read in chunks beside decode steps, the second time after pages
    that are there; and of how many parts ranges were attended to at once."""
    engine = make_engine(communicator, folder, max_context=192, prefill_chunk=40, batch_size=3)
    calls: list[int] = []
    part_attention.ranges_attention = spied(calls)
    if max_keys is not None:
        engine.target = replace(engine.target, max_keys=max_keys)
    states = [pass_states(engine, parts) for parts in PASSES]
    shared = prompts_of("llama")[3] * 3
    prompts = [shared[:64] + prompt for prompt in prompts_of("llama")]
    prompts += [prompt * 2 for prompt in prompts_of("llama")]
    answers = [
        answer.token_ids
        for _ in range(2)
        for answer in generate(engine, numbered(prompts), demo_tokenizer(), StopRules(9)).answers
    ]
    return states, answers, calls


@pytest.mark.parametrize("world_size", [1, 2])
def test_answers_are_those_of_part_by_part(folders: dict[str, Path], world_size: int) -> None:
    """Four query heads have two KV heads; passes hold fresh, continued and shared prompts."""
    by_part = run_on_ranks(states_and_answers, world_size, folders["llama"], 0)
    assert all(not calls for _, _, calls in by_part)
    for max_keys in (None, 100):
        found = run_on_ranks(states_and_answers, world_size, folders["llama"], max_keys)
        for (states, answers, calls), (expected, tokens, _) in zip(found, by_part, strict=True):
            assert answers == tokens
            assert max(calls) > 2
            for each, other in zip(states, expected, strict=True):
                torch.testing.assert_close(each, other, rtol=0, atol=2e-5 * float(other.abs().max()))
