"""How many tokens a sequence may have, and why."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from launcher.config import HardwareKind
from launcher.memory.demand import Demand
from launcher.memory.fit import fits
from launcher.plan import remedies as plan_remedies
from parallel.units import GIB
from tests.launcher.jobs import RTX_4090
from tests.launcher.plans import CPU, LLAMA_8B, LLAMA_70B, LLAMA_70B_AWQ, TINY, cards_of, plan, refused


def test_context_that_is_set_is_kept() -> None:
    decided = plan(LLAMA_8B, cards_of(1), engine__max_context=1001)
    assert (decided.max_context, decided.max_context_reason) == (1001, "engine.max_context was set.")


def test_context_beyond_the_model_is_refused() -> None:
    message = refused(TINY, cards_of(1), engine__max_context=131073)
    assert "engine.max_context=131073" in message
    assert "131072 positions" in message


def test_context_beyond_a_sliding_window_is_refused() -> None:
    shape = replace(TINY, sliding_window=4096)
    assert "sliding window of 4096" in refused(shape, cards_of(1), engine__max_context=5000)
    assert plan(shape, cards_of(1), engine__max_context=4096).max_context == 4096


def test_default_context_is_capped_by_model_and_window() -> None:
    assert plan(TINY, cards_of(1)).max_context == 8192
    assert plan(replace(TINY, max_positions=1000), cards_of(1)).max_context == 1000
    decided = plan(replace(TINY, sliding_window=4096), cards_of(1))
    assert decided.max_context == 4096
    assert "sliding window" in decided.max_context_reason


def test_default_context_grows_with_the_workload() -> None:
    decided = plan(TINY, cards_of(1), workload__prompt_tokens=20000)
    assert decided.max_context == 20128


def test_default_context_shrinks_to_what_fits_in_whole_pages_with_a_little_kept_free() -> None:
    changes = {"workload__batch_size": 8}
    decided = plan(LLAMA_70B_AWQ, cards_of(2), 2, **changes)
    assert decided.max_context % 64 == 0
    assert 2000 < decided.max_context < 8192
    assert "fits" in decided.max_context_reason
    assert decided.kv_tokens_that_fit >= 8 * decided.max_context
    more = plan(LLAMA_70B_AWQ, cards_of(2), 2, engine__max_context=decided.max_context + 64, **changes)
    for chosen, larger in zip(decided.cards, more.cards, strict=True):
        assert chosen.predicted_bytes <= 0.98 * chosen.budget_bytes < larger.predicted_bytes


def test_workload_beyond_the_model_names_output_tokens() -> None:
    message = refused(replace(TINY, max_positions=100), cards_of(1))
    assert "workload.prompt_tokens + workload.output_tokens = 129" in message
    assert "Lower workload.output_tokens" in message


def test_workload_that_does_not_fit_is_refused_with_sizes() -> None:
    message = refused(LLAMA_70B_AWQ, cards_of(2), 2, workload__prompt_tokens=60000)
    assert "sequences of 60128 tokens" in message
    assert "kv_cache 9.19" in message


def test_workload_that_does_not_fit_is_told_how_much_of_it_would() -> None:
    """Not a smaller engine.max_context, which the same workload exceeds."""
    message = refused(LLAMA_70B_AWQ, cards_of(2), 2, workload__prompt_tokens=60000, workload__output_tokens=100)
    assert "engine.max_context" not in message
    advised = int(message.split("(workload.prompt_tokens + workload.output_tokens=")[1].split(")")[0])
    decided = plan(LLAMA_70B_AWQ, cards_of(2), 2, workload__prompt_tokens=advised - 100, workload__output_tokens=100)
    assert decided.max_context == advised


def test_advice_for_a_huge_batch_is_found_in_few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = []
    monkeypatch.setattr(plan_remedies, "fits", lambda *args: trials.append(args) or fits(*args))
    message = refused(LLAMA_70B_AWQ, cards_of(2), 2, workload__batch_size=10**6, engine__max_context=129)
    advised = int(re.findall(r"workload.batch_size=(\d+)", message)[-1])
    assert len(trials) < 500
    plan(LLAMA_70B_AWQ, cards_of(2), 2, workload__batch_size=advised, engine__max_context=129)
    refused(LLAMA_70B_AWQ, cards_of(2), 2, workload__batch_size=advised + 1, engine__max_context=129)


def test_limit_below_what_the_driver_keeps_leaves_nothing_and_not_less() -> None:
    message = refused(LLAMA_70B_AWQ, cards_of(2), 2, limits__card_memory_gib=0.1)
    assert "GiB of 0.00 (limits.card_memory_gib=0.1): context" in message


def test_what_is_short_of_a_limit_names_it() -> None:
    assert "GiB of 7.61 (limits.card_memory_gib=8): " in refused(
        LLAMA_70B_AWQ, cards_of(2), 2, limits__card_memory_gib=8
    )
    assert "limits" not in refused(LLAMA_70B, cards_of(2), 2, limits__card_memory_gib=24)
    on_cpu = refused(LLAMA_70B_AWQ, replace(CPU, host_memory_bytes=16 * GIB), 2, limits__card_memory_gib=4)
    assert "rank 1 on the CPU: " in on_cpu and "GiB of 4.00 (limits.card_memory_gib=4): " in on_cpu


def test_ranks_on_the_cpu_that_nobody_asked_for_are_explained() -> None:
    small, words = replace(CPU, host_memory_bytes=16 * GIB), "No NVIDIA card was found: python -m tools.health"
    assert words in refused(LLAMA_70B_AWQ, small, 2)
    assert words not in refused(LLAMA_70B_AWQ, small, 2, hardware__kind=HardwareKind.cpu)
    assert words not in refused(LLAMA_70B, cards_of(2), 2)


def test_ranks_after_one_that_exceeds_its_card_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are most of what a refusal takes, which tries hundreds of settings."""
    counted, count = list[int](), Demand._varying
    monkeypatch.setattr(
        Demand, "_varying", lambda self, rank, tokens: counted.append(rank) or count(self, rank, tokens)
    )
    demand = Demand(LLAMA_70B, 4, 128, "bfloat16", "auto", "cuda", "nccl", 1, 512)
    assert not fits(demand, (40 * GIB, 24 * GIB, 24 * GIB, 24 * GIB), 512)
    assert counted == [0, 1]


def test_context_that_does_not_fit_names_sizes_and_what_fits() -> None:
    changes = {"engine__max_context": 11500, "workload__batch_size": 4}
    message = refused(LLAMA_70B_AWQ, cards_of(2), 2, **changes)
    assert f"rank 1 on card 1 ({RTX_4090}): " in message
    assert "weights 18.52, kv_cache 7.04" in message
    assert "workload.batch_size=2" in message
    assert "gpus=3 with 3 such cards" in message
    advised = int(message.split("engine.max_context=")[1].split(")")[0])
    assert plan(LLAMA_70B_AWQ, cards_of(2), 2, **(changes | {"engine__max_context": advised})).max_context == advised
    refused(LLAMA_70B_AWQ, cards_of(2), 2, **(changes | {"engine__max_context": advised + 1}))
    plan(LLAMA_70B_AWQ, cards_of(2), 2, **(changes | {"workload__batch_size": 2}))
    plan(LLAMA_70B_AWQ, cards_of(3), 3, **changes)
