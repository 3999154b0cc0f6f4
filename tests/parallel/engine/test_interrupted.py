"""What is raised while prompts are answered leaves an engine that answers the next ones as if nothing had been."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from parallel.communicator import Communicator
from parallel.engine.answer import Answer, StopRules
from parallel.engine.engine import Engine
from parallel.engine.generate import Listener, Prompt, generate
from parallel.engine.limits import EngineLimits
from parallel.engine.page_allocator import OutOfPagesError
from parallel.engine.prefix_cache import PrefixCache
from parallel.engine.sequence import Part, TokenSequence
from parallel.engine.step_timer import time_steps
from parallel.kernels.limits import PAGE_SIZE
from tests.parallel.engine.traced_engine import VOCABULARY, TracedEngine, answer_alone
from tests.parallel.ranks import demo_tokenizer, make_engine, numbered, run_on_ranks
from tests.parallel.small_models import prompts_of

TOKENIZER: Tokenizer = Tokenizer(WordLevel({}, unk_token=""))
NUM_TOKENS = 12


class FailingEngine(TracedEngine):
    """Raises `error` in place of its `fails_at`-th pass, of prompts or steps."""

    fails_at = -1
    error: type[BaseException] = RuntimeError

    def count(self) -> None:
        self.fails_at -= 1
        if self.fails_at == 0:
            raise self.error("this pass")

    def prefill(self, parts: Sequence[Part]) -> Tensor:
        self.count()
        return super().prefill(parts)

    def step(self, sequences: Sequence[TokenSequence]) -> Tensor:
        self.count()
        return super().step(sequences)


@pytest.mark.parametrize("fails_at", (1, 2, 3, 5, 8))
@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt))
def test_engine_answers_after_a_pass_that_failed(fails_at: int, error: type[BaseException]) -> None:
    """Prompts of that pass share pages whose keys and values it was to write: nobody may believe in them."""
    head = [token % VOCABULARY for token in range(2 * PAGE_SIZE)]
    prompts = [[*head, index] for index in range(2, 7)]
    engine = FailingEngine(EngineLimits(200, 2, 100), PrefixCache(1 + 2 * 4))
    numbered_prompts = [Prompt(index, ids) for index, ids in enumerate(prompts)]

    def answer() -> list[list[int]]:
        result = generate(cast(Engine, engine), numbered_prompts, TOKENIZER, StopRules(NUM_TOKENS, frozenset({1})))
        return [found.token_ids for found in result.answers]

    engine.fails_at, engine.error = fails_at, error
    with pytest.raises(error, match="this pass"):
        answer()
    assert engine.pages.num_free == 8
    assert answer() == [answer_alone(prompt, NUM_TOKENS) for prompt in prompts]
    assert engine.pages.num_free == 8


def answers_around_an_error(communicator: Communicator, folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Answers before and after one whose text nobody could take."""
    engine, both = make_engine(communicator, folder), []

    def refuse(row: int, answer: Answer) -> None:
        raise BrokenPipeError

    for on_answer in (lambda row, answer: None, refuse, lambda row, answer: None):
        try:
            result = generate(
                engine, numbered(prompts_of("llama")), demo_tokenizer(), StopRules(9), Listener(on_answer=on_answer)
            )
            both.append([answer.token_ids for answer in result.answers])
        except BrokenPipeError:
            assert (engine.order, engine.fresh) == ([], {})
        assert engine.pages.num_free == 4
    return both[0], both[1]


def test_answers_are_the_same_after_a_callback_that_failed(folders: dict[str, Path]) -> None:
    before, after = run_on_ranks(answers_around_an_error, 1, folders["llama"])[0]
    assert before == after


def kept_by_the_engine(communicator: Communicator, folder: Path) -> tuple[int, list[list[int]], list[list[int]]]:
    """First tokens that wait for a step after answers of one token; those answers, and longer ones."""
    engine, prompts = make_engine(communicator, folder), numbered(prompts_of("llama"))
    short, long = (generate(engine, prompts, demo_tokenizer(), StopRules(num)).answers for num in (1, 9))
    return len(engine.fresh), [each.token_ids for each in short], [each.token_ids for each in long]


def test_answers_of_one_token_leave_nothing_behind(folders: dict[str, Path]) -> None:
    num_kept, short, long = run_on_ranks(kept_by_the_engine, 1, folders["llama"])[0]
    assert num_kept == 0
    assert short == [tokens[:1] for tokens in long]


def free_after_too_many(communicator: Communicator, folder: Path) -> tuple[int, int]:
    engine = make_engine(communicator, folder)
    before = engine.pages.num_free
    with pytest.raises(OutOfPagesError):
        time_steps(engine, [64] * (before + 1), 1, communicator)
    return before, engine.pages.num_free


def test_steps_that_find_no_pages_give_back_those_they_found(folders: dict[str, Path]) -> None:
    before, after = run_on_ranks(free_after_too_many, 1, folders["llama"])[0]
    assert before == after
