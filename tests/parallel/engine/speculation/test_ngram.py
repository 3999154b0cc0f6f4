"""Drafts that are looked up: against plain Python, over random texts of few tokens."""

import random

import pytest
import torch

from parallel.engine.speculation.ngram import look_up


def expected(tokens: list[int], num_drafts: int, longest: int, shortest: int) -> list[int]:
    """The longest end of the text that was there before, at its latest, and what came after it, token by token."""
    for size in range(longest, shortest - 1, -1):
        end = tokens[-size:]
        for start in range(len(tokens) - size - 1, -1, -1):
            if len(end) == size and tokens[start : start + size] == end:
                text = list(tokens)
                for i in range(num_drafts):
                    text.append(text[start + size + i])
                return text[len(tokens) :]
    return [-1] * num_drafts


@pytest.mark.parametrize(("longest", "shortest"), [(3, 2), (1, 1), (4, 1), (3, 3)])
def test_drafts_are_what_followed_the_longest_then_latest_match(longest: int, shortest: int) -> None:
    """Tokens behind the newest, of which there are any, do not count."""
    draw = random.Random(f"{longest} {shortest}")
    texts = [[draw.randrange(4) for _ in range(draw.randint(1, 30))] for _ in range(400)]
    rows = [text + [draw.randrange(4) for _ in range(33 - len(text))] for text in texts]
    newest = torch.tensor([len(text) - 1 for text in texts])
    found = look_up(torch.tensor(rows, dtype=torch.int32), newest, 4, longest, shortest)
    wanted = [expected(text, 4, longest, shortest) for text in texts]
    assert found.tolist() == wanted
    assert 0 < sum(drafts[0] < 0 for drafts in wanted) < len(wanted)


def test_period_goes_on() -> None:
    tokens = torch.tensor([[9, 8, 5, 6, 7, 5, 6, 7, 5, 6, 0, 0, 0]], dtype=torch.int32)
    assert look_up(tokens, torch.tensor([9]), 5, 3, 2).tolist() == [[7, 5, 6, 7, 5]]


def test_text_of_one_token_over_and_over_is_its_own_draft() -> None:
    assert look_up(torch.full((1, 9), 4), torch.tensor([3]), 3, 3, 2).tolist() == [[4, 4, 4]]


def test_first_token_has_no_drafts() -> None:
    """Not even where what follows it in memory, or token 0, looks like a match."""
    assert look_up(torch.zeros(1, 9, dtype=torch.int32), torch.tensor([0]), 2, 2, 1).tolist() == [[-1, -1]]


def test_longest_may_be_more_than_there_is_room_for() -> None:
    tokens = torch.tensor([[5, 6, 5, 6, 5, 0]], dtype=torch.int32)
    assert look_up(tokens, torch.tensor([4]), 3, 100, 2).tolist() == [[6, 5, 6]]
    assert look_up(tokens, torch.tensor([4]), 3, 100, 4).tolist() == [[-1, -1, -1]]
