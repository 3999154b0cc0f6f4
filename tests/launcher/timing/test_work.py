"""What predictions count of a model, on the rank that has most of it."""

from __future__ import annotations

import pytest

from launcher.plan.plan import demand_of
from launcher.plan.topology import place_ranks
from launcher.timing.work import work_of
from tests.launcher.plans import LLAMA_70B, cards_of, run_of


@pytest.mark.parametrize(("world_size", "num_kv_heads"), [(1, 8), (2, 4), (3, 3), (4, 2)])
def test_query_heads_go_with_their_kv_heads(world_size: int, num_kv_heads: int) -> None:
    """Of 64 over three ranks the fullest has 24: those of 3 of the 8 KV heads, not a third."""
    run = run_of()
    placement = place_ranks(run, world_size, cards_of(world_size))
    work = work_of(demand_of(run, placement, LLAMA_70B, None))
    assert work.num_heads == 8 * num_kv_heads
    assert work.kv_bytes_per_token == num_kv_heads * 2 * 128 * 2
