"""What the scheduler guarantees, over random batches: order, no waiting for ever, and no page but one's own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from parallel.engine.answer import StopRules
from parallel.engine.engine import Engine
from parallel.engine.generate import Listener, Prompt, Result, generate
from parallel.engine.limits import EngineLimits
from parallel.engine.page_allocator import OutOfPagesError, PageAllocator
from parallel.engine.prefix_cache import PrefixCache
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.pages import pages_for
from tests.parallel.engine.traced_engine import EOS, VOCABULARY, TracedEngine, answer_alone

# Of every kind of size: what divides a page, what a page divides, and neither.
CHUNKS = (1, 7, 64, 100, 128, 1000)
MAX_CONTEXT = 400
RULES = StopRules(12, frozenset({EOS}))
TOKENIZER: Tokenizer = Tokenizer(WordLevel({}, unk_token=""))


def run(engine: TracedEngine, prompts: Sequence[list[int]], rules: StopRules = RULES) -> Result:
    numbered = [Prompt(index, ids) for index, ids in enumerate(prompts)]
    return generate(cast(Engine, engine), numbered, TOKENIZER, rules)


def random_prompts(draw: random.Random, num: int) -> list[list[int]]:
    """Heads of up to four pages, of two kinds of page, that many share, and tails of their own."""
    kinds = [[draw.randrange(VOCABULARY) for _ in range(PAGE_SIZE)] for _ in range(2)]
    prompts = []
    for _ in range(num):
        head = [token for _ in range(draw.randrange(5)) for token in draw.choice(kinds)]
        tail = [draw.randrange(VOCABULARY) for _ in range(draw.choice((0, 1, 5, 63, 64, 70)))]
        prompts.append(head + tail or [3])
    return prompts


def num_shared(prompt: list[int], others: Sequence[list[int]]) -> int:
    """Tokens of the whole pages that a prompt, but for its last token, begins with as one of `others` does."""
    ends = range(0, len(prompt), PAGE_SIZE)
    return max(end for end in ends if end == 0 or any(other[:end] == prompt[:end] for other in others))


@pytest.mark.parametrize("kind", (PageAllocator, PrefixCache))
@pytest.mark.parametrize("seed", range(30))
def test_every_prompt_is_answered_as_if_it_were_alone(seed: int, kind: type[PageAllocator]) -> None:
    """Sequences join and leave at any step, in pages that are plenty or just enough for the longest."""
    draw = random.Random(seed)
    limits = EngineLimits(MAX_CONTEXT, draw.choice((1, 2, 3, 8)), draw.choice(CHUNKS), draw.choice((None, 5, 64, 999)))
    num_pages = draw.choice((1 + limits.pages_per_sequence, 3 + limits.pages_per_sequence, limits.num_pages, 1000))
    engine, prompts = TracedEngine(limits, kind(num_pages)), random_prompts(draw, 12)
    for _ in range(2):
        engine.events.clear()
        result = run(engine, prompts)
        assert [found.token_ids for found in result.answers] == [answer_alone(prompt, 12) for prompt in prompts]
        assert engine.pages.num_free == num_pages - 1
        assert result.prompt_tokens == sum(map(len, prompts))
        check_order(engine.events, len(prompts))
        check_steps(engine.events)


def check_order(events: list[tuple[str, list[int]]], num_prompts: int) -> None:
    """The oldest prompt that is not read yet has a part of each pass, and parts are in the order of the prompts."""
    passes = [indices for kind, indices in events if kind == "prefill"]
    assert all(indices == sorted(indices) for indices in passes)
    assert all(indices[0] == min(map(min, passes[at:])) for at, indices in enumerate(passes))
    assert {index for indices in passes for index in indices} == set(range(num_prompts))


def check_steps(events: list[tuple[str, list[int]]]) -> None:
    """Who has begun to answer takes every step until it ends, and between two passes of prompts there is one."""
    steps = [set(indices) for kind, indices in events if kind == "step"]
    for index in set().union(*steps):
        present = [at for at, indices in enumerate(steps) if index in indices]
        assert present == list(range(present[0], present[-1] + 1))
    for at, (first, second) in enumerate(pairwise(events)):
        if (first[0], second[0]) == ("prefill", "prefill"):
            before = {i for kind, indices in events[:at] if kind == "step" for i in indices}
            after = {i for kind, indices in events[at:] if kind == "step" for i in indices}
            assert not before & after


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("batch_size", (1, 8))
def test_all_that_earlier_prompts_have_is_reused_where_pages_are_plenty(seed: int, batch_size: int) -> None:
    """In the same batch too."""
    draw = random.Random(seed)
    prompts = random_prompts(draw, 12)
    engine = TracedEngine(EngineLimits(MAX_CONTEXT, batch_size, draw.choice(CHUNKS)), PrefixCache(1000))
    for earlier in ([], prompts):
        expected = sum(num_shared(prompt, earlier + prompts[:at]) for at, prompt in enumerate(prompts))
        result = run(engine, prompts)
        assert result.reused_tokens == expected
        assert expected > 0


def test_head_that_eight_prompts_share_is_read_once() -> None:
    head = [token % VOCABULARY for token in range(200)]
    prompts = [[*head, 5, index] for index in range(8)]
    engine = TracedEngine(EngineLimits(MAX_CONTEXT, 8, 1000), PrefixCache(1 + 3 + 8))
    progress: list[tuple[int, int]] = []
    result = generate(
        cast(Engine, engine),
        [Prompt(index, ids) for index, ids in enumerate(prompts)],
        TOKENIZER,
        RULES,
        Listener(on_prefill=lambda *tokens: progress.append(tokens)),
    )
    assert result.reused_tokens == 7 * 3 * PAGE_SIZE
    assert progress == [(8 * 202, 8 * 202)]
    # One pass reads all: the first prompt whole, of the others what is their own.
    assert engine.events[0] == ("prefill", list(range(8)))
    assert all(kind == "step" for kind, _ in engine.events[1:])


@pytest.mark.parametrize(("while_decoding", "expected"), [(None, [200, 190]), (50, [200, 50, 140]), (999, [200, 190])])
def test_passes_are_shorter_while_answers_wait_for_them(while_decoding: int | None, expected: list[int]) -> None:
    """The first prompt's answer needs two steps after its first token; then the rest is read at once."""
    engine = TracedEngine(EngineLimits(MAX_CONTEXT, 2, 200, while_decoding), PageAllocator(1 + 2 * 7))
    prompts = [Prompt(0, [2] * 10), Prompt(1, [3] * 380)]
    done: list[int] = [0]
    listener = Listener(on_prefill=lambda now, total: done.append(now))
    generate(cast(Engine, engine), prompts, TOKENIZER, StopRules(3), listener)
    assert [end - start for start, end in pairwise(done)] == expected


def test_shared_pages_let_more_sequences_in() -> None:
    """Pages for one long prompt and an answer, and one answer more."""
    prompts = [[4] * 3 * PAGE_SIZE + [index] for index in range(2)]
    largest = {}
    for kind in (PageAllocator, PrefixCache):
        engine = TracedEngine(EngineLimits(MAX_CONTEXT, 2, 1000), kind(1 + 4 + 1))
        run(engine, prompts, StopRules(5))
        largest[kind] = max(len(indices) for what, indices in engine.events if what == "step")
    assert largest == {PageAllocator: 1, PrefixCache: 2}


def test_long_prompt_is_not_overtaken_where_pages_are_short() -> None:
    """It waits for all pages, and short ones behind it wait for it, so that they cannot keep it out for ever."""
    prompts = [[2] * 70, [3] * 300, *([index] for index in range(4, 10))]
    engine = TracedEngine(EngineLimits(MAX_CONTEXT, 4, 1000), PrefixCache(1 + pages_for(312)))
    run(engine, prompts)
    read = [index for kind, indices in engine.events if kind == "prefill" for index in indices]
    assert read == sorted(read)


def test_prompt_that_can_never_have_its_pages_is_an_error() -> None:
    engine = TracedEngine(EngineLimits(MAX_CONTEXT, 4, 1000), PrefixCache(1 + 2))
    with pytest.raises(OutOfPagesError):
        run(engine, [[2] * 70, [3] * 300])


def test_pages_asked_for_beside_the_scheduler_come_out_of_the_cache() -> None:
    """As the timing of steps does: what it overwrites is known no more."""
    engine = TracedEngine(EngineLimits(MAX_CONTEXT, 2, 100), PrefixCache(1 + 8))
    prompts = [[index % VOCABULARY for index in range(150)]] * 2
    run(engine, prompts)
    lent = engine.pages.allocate(8)
    engine.slots.clear()
    engine.pages.release(lent)
    assert run(engine, prompts).reused_tokens == 2 * PAGE_SIZE
