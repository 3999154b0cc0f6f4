"""Ranks that drifted apart are found at the end of a run, and none of its answers is reported."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from launcher.rank.context import RankContext
from launcher.tasks import generate
from launcher.tasks.generate import check_same_tokens
from launcher.tasks.loaded import LoadedModel
from parallel.communicator import Communicator
from parallel.engine.answer import Answer
from parallel.engine.generate import Result
from tests.launcher.cli import SHORT
from tests.launcher.forked import ForkedProcess, run
from tests.launcher.jobs import make_job
from tests.parallel.ranks import CPU, run_on_ranks

Tokens = list[list[int]]
SAME: Tokens = [[5, 6, 7], [8]]


def told(communicator: Communicator, tokens_of_ranks: list[Tokens]) -> str:
    context = RankContext(make_job(Path(), world_size=3), communicator.rank, CPU, communicator, (), cast(Any, None))
    try:
        check_same_tokens(context, [Answer(tokens) for tokens in tokens_of_ranks[communicator.rank]])
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("other", [[[5, 6, 7], [9]], [[5, 6], [7, 8]], [[5, 6, 7]]], ids=["token", "place", "number"])
def test_a_rank_with_other_tokens_is_an_error_on_all(other: Tokens) -> None:
    assert run_on_ranks(told, 3, [SAME] * 3) == [""] * 3
    for message in run_on_ranks(told, 3, [SAME, SAME, other]):
        assert message.startswith("ranks picked different tokens: the links or a card corrupt data.")


def drift() -> None:
    """Of the process of a run: the last token on rank 1 is another."""
    answer_prompts = generate.answer_prompts

    def answer(context: RankContext, loaded: LoadedModel, token_ids: list[list[int]]) -> Result:
        result = answer_prompts(context, loaded, token_ids)
        result.answers[0].token_ids[-1] += context.rank
        return result

    generate.answer_prompts = answer


def test_a_run_whose_ranks_drifted_apart_fails(tmp_path: Path) -> None:
    error = run("gpus=2", *SHORT, folder=tmp_path / "run", launcher=partial(ForkedProcess, before=drift)).error
    assert error["message"].startswith("ranks picked different tokens")
