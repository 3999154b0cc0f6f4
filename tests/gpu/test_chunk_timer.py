"""What a pass takes on the card, apart from the host that queues it."""

from __future__ import annotations

import time

import pytest
import torch

from parallel.engine.chunk_timer import time_apart
from parallel.transports.solo import Solo

pytestmark = pytest.mark.gpu

CARD = torch.device("cuda", 0)
NUM_PRODUCTS, PAUSE_SEC = 20, 0.003


def test_a_host_that_dawdles_is_told_from_the_card() -> None:
    matrix = torch.randn(1024, 1024, device=CARD, dtype=torch.bfloat16)

    def dawdle() -> None:
        for _ in range(NUM_PRODUCTS):
            matrix @ matrix
            time.sleep(PAUSE_SEC)

    time_apart(dawdle, Solo(CARD), CARD)
    found = time_apart(dawdle, Solo(CARD), CARD)
    assert found.whole >= found.queued >= NUM_PRODUCTS * PAUSE_SEC * 1e3
    # Products of some ten microseconds each, with the host asleep between them for a hundred times as long.
    assert 0 < found.card < found.queued / 4


def test_a_card_that_is_behind_is_all_that_counts() -> None:
    matrix = torch.randn(8192, 8192, device=CARD, dtype=torch.bfloat16)

    def run() -> None:
        for _ in range(NUM_PRODUCTS):
            matrix @ matrix

    time_apart(run, Solo(CARD), CARD)
    found = time_apart(run, Solo(CARD), CARD)
    assert found.queued < found.card / 2
    assert found.card == pytest.approx(found.whole, rel=0.2)
