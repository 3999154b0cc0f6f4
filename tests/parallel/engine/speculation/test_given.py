"""What a step with drafts gives, from the device to the host."""

from __future__ import annotations

import torch

from parallel.engine.speculation.given import Given, empty_given, put_given


def test_rows_read_back_what_was_put_into_them() -> None:
    given = empty_given(3, 2, torch.device("cpu"))
    tokens, nodes = torch.tensor([[5, 6, 7], [8, 9, 0], [1, 2, 3]]), torch.tensor([[0, 4, 9], [0, 1, 2], [0, 1, 2]])
    put_given(given, torch.tensor([6, 2, 0]), tokens, nodes, torch.tensor([3, 1, 0]))
    assert [Given.read(row) for row in given.tolist()] == [Given([5, 6, 7], 6, [4, 9]), Given([8], 2), Given([], 0)]


def test_row_without_drafts_has_its_token() -> None:
    given = empty_given(1, 0, torch.device("cpu"))
    given[:, 1] = 7
    assert Given.read(given[0].tolist()) == Given([7], 0)
