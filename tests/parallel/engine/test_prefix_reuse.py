"""Answers of real small models: a page that is reused says what it said when it was computed anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.engine.answer import StopRules
from parallel.engine.engine import Engine
from parallel.engine.generate import generate
from parallel.engine.page_allocator import PageAllocator
from parallel.engine.sampling import SamplingParams
from parallel.engine.sequence import Part
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.pages import FP8
from tests.parallel.ranks import demo_tokenizer, make_engine, numbered, run_on_ranks
from tests.parallel.small_models import CONFIGS

SAMPLED = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, seed=3)
MAX_CONTEXT = 320
NUM_TOKENS = 5
# Chunks that end where pages do, one prompt at a time: passes have the same shapes with reuse and without.
ALIGNED: dict[str, dict[str, Any]] = {
    "greedy": {"batch_size": 1, "prefill_chunk": PAGE_SIZE},
    "fp8, sampled": {"batch_size": 1, "prefill_chunk": PAGE_SIZE, "kv_dtype": FP8, "sampling": SAMPLED},
}
MIXED: dict[str, dict[str, Any]] = {
    "many in a pass": {"batch_size": 3, "prefill_chunk": 1000},
    "chunks, sampled": {"batch_size": 3, "prefill_chunk": 50, "sampling": SAMPLED},
}


def shared_prompts(seed: int) -> list[list[int]]:
    """Two heads, one the beginning of the other, and tails of lengths around a page's."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(CONFIGS["llama"].vocab_size, (1000,), generator=generator).tolist()
    head, tails = numbers[:200], [numbers[300 + 70 * at :][:size] for at, size in enumerate((1, 63, 64, 5, 0))]
    return [head[: 200 if at % 2 else 128] + tail for at, tail in enumerate(tails)]


@dataclass(frozen=True)
class Found:
    """Answers, logits after each prompt as this rank has them, and how many tokens were reused."""

    answers: list[list[int]]
    logits: list[Tensor]
    reused_tokens: int


def answer(engine: Engine, prompts: list[list[int]]) -> Found:
    logits: list[Tensor] = []
    plain = Engine.prefill

    def prefill(parts: Sequence[Part]) -> Tensor:
        logits.append(plain(engine, parts).clone())
        return logits[-1]

    engine.prefill = prefill  # type: ignore[method-assign]
    result = generate(engine, numbered(prompts), demo_tokenizer(), StopRules(NUM_TOKENS))
    return Found([found.token_ids for found in result.answers], [x for x in logits if len(x)], result.reused_tokens)


def with_and_without(
    communicator: Communicator, folder: Path, prompts: list[list[int]], options: dict[str, Any]
) -> list[Found]:
    """Without reuse, with it, and once more, when prompts are known."""
    engine = make_engine(communicator, folder, max_context=MAX_CONTEXT, **options)
    reusing, engine.pages = engine.pages, PageAllocator(engine.limits.num_pages)
    without = answer(engine, prompts)
    engine.pages = reusing
    return [without, answer(engine, prompts), answer(engine, prompts)]


@pytest.mark.parametrize("world_size", (1, 2, 3))
@pytest.mark.parametrize("kind", ALIGNED)
def test_reused_pages_leave_no_bit_changed(folders: dict[str, Path], kind: str, world_size: int) -> None:
    """Where passes have the same shapes with reuse and without; whatever differs there was read from the cache."""
    seed = int(torch.randint(10**6, ()))
    prompts = shared_prompts(seed)
    ranks = run_on_ranks(with_and_without, world_size, folders["llama"], prompts, ALIGNED[kind])
    for without, *others in ranks:
        check_reuse(without, others, ranks[0][0])
        for found in others:
            assert len(found.logits) == len(prompts)
            assert all(map(torch.equal, found.logits, without.logits)), seed


@pytest.mark.parametrize("world_size", (1, 2, 3))
@pytest.mark.parametrize("kind", MIXED)
def test_reused_pages_leave_no_trace_in_answers(folders: dict[str, Path], kind: str, world_size: int) -> None:
    """Where reuse changes what goes through the model together. A seed that is fixed meets no tie."""
    ranks = run_on_ranks(with_and_without, world_size, folders["llama"], shared_prompts(1), MIXED[kind])
    for without, *others in ranks:
        check_reuse(without, others, ranks[0][0])


def check_reuse(without: Found, others: list[Found], first_rank: Found) -> None:
    assert without.reused_tokens == 0
    assert without.answers == first_rank.answers
    assert [found.answers for found in others] == [without.answers] * 2
    # Of each prompt, what those before it have: the last is no more than two pages, and its last token is computed.
    assert others[0].reused_tokens == (0 + 2 + 2 + 3 + 1) * PAGE_SIZE
    assert others[1].reused_tokens > others[0].reused_tokens


def spoiled(communicator: Communicator, folder: Path) -> list[Found]:
    """An answer from pages that hold what they should, and from the same with one number changed."""
    engine = make_engine(communicator, folder, max_context=MAX_CONTEXT, batch_size=1)
    prompt, found = shared_prompts(1)[1], []
    for change in (0.0, 0.0, 1.0):
        lent, _ = engine.pages.reserve(prompt, 5)
        engine.caches[1].values[lent[2], 0, 5, 3] += change
        engine.pages.release(lent)
        found.append(answer(engine, [prompt]))
    return found


def test_reused_pages_are_read(folders: dict[str, Path]) -> None:
    _, clean, changed = run_on_ranks(spoiled, 1, folders["llama"])[0]
    assert clean.reused_tokens == changed.reused_tokens == 4 * PAGE_SIZE
    assert not torch.equal(clean.logits[0], changed.logits[0])
