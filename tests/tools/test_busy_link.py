from __future__ import annotations

import sys

import pytest
import torch

from parallel.offload.host_trial import COPY_BYTES, Link
from tools import busy_link


class CountedLink(Link):
    """A copy is done each time it is asked for."""

    def __init__(self) -> None:
        self.num_done = 7

    def keep_busy(self) -> None:
        self.num_done += 1


def test_copies_go_on_until_the_command_ends_and_its_status_is_told() -> None:
    link = CountedLink()
    status, beside = busy_link.run_beside(
        link, [sys.executable, "-c", "import time; time.sleep(1); raise SystemExit(3)"]
    )
    assert status == 3
    assert 2 <= link.num_done <= 1 / busy_link.WAIT_SEC * 30
    # Copies before the command do not count.
    assert 0 < beside < link.num_done * COPY_BYTES


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_nothing_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        busy_link.main(["--", sys.executable, "-c", "print('ran')"])
    told = capsys.readouterr()
    assert "no card" in told.err
    assert "ran" not in told.out
