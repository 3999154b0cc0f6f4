"""The workloads of task=predictions, as they are planned."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.config import PredictionsConfig
from launcher.plan.grid import plan_grid
from launcher.plan.topology import PlanError, place_ranks
from tests.launcher.plans import LLAMA_8B, cards_of, run_of


def test_what_does_not_fit_is_left_out_with_its_size_on_the_card_that_lacks_room() -> None:
    """Of cards of two sizes the second, since the first has room."""
    first, second = cards_of(2).cards
    cards = replace(cards_of(2), cards=(first, replace(second, memory_bytes=12 * 2**30)))
    run = run_of(predictions=PredictionsConfig([1, 32], [2000]))
    one, many = plan_grid(run, place_ranks(run, 2, cards), LLAMA_8B, cards)
    assert one.plan is not None and one.skipped is None
    assert many.plan is None and many.skipped is not None
    assert many.skipped.startswith("sequences of 2128 tokens with workload.batch_size=32 do not fit: ")
    assert many.skipped.endswith(" GiB of 11.61")
    run.predictions.batch_sizes = [32]
    with pytest.raises(PlanError, match=r"no workload of the grid can be run\. sequences of .* GiB of 11\.61$"):
        plan_grid(run, place_ranks(run, 2, cards), LLAMA_8B, cards)
