"""What a rank makes of the times that a generation took."""

from __future__ import annotations

from launcher.tasks.generate import longest_contexts
from launcher.tasks.measure import latencies, reuse
from parallel.engine.answer import Answer
from parallel.engine.generate import Result


def test_latencies_are_medians_over_prompts_and_over_later_tokens() -> None:
    tokens = [float(time) for time in range(200, 0, -1)]
    found = latencies(Result([], ttft_ms=[5.0, 100.0, 1.0, 9.0], step_ms=[7.0], token_ms=tokens))
    assert found == {"ttft_ms": 7.0, "tpot_ms": {"p50": 100.5, "p99": 198.0}}


def test_answers_of_one_token_have_no_time_a_token() -> None:
    assert latencies(Result([], ttft_ms=[3.0])) == {"ttft_ms": 3.0, "tpot_ms": {"p50": None, "p99": None}}


def test_reuse_is_what_the_cache_had() -> None:
    assert reuse(Result([], prompt_tokens=90, reused_tokens=64)) == {"prompt_tokens": 90, "reused_tokens": 64}


def test_a_context_is_a_prompt_and_its_answer() -> None:
    assert longest_contexts([[1, 2, 3], [4]], Result([Answer([5, 6]), Answer([])])) == [5, 1]
