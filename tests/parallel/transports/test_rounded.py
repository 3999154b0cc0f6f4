"""Sums of numbers rounded to 8 bits: their error, their groups, and that every rank gets the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.transports.rounded import Rounded, find_wrong_rounded_sums, group, round_to_int8, ungroup
from tools.local_ranks import run_on_ranks


def test_the_error_is_half_a_code_and_that_of_the_scale() -> None:
    values = torch.randn(100, 1000) * torch.logspace(-20, 20, 100)[:, None]
    rounded = round_to_int8(values)
    largest = group(values.flatten()).abs().amax(dim=-1, keepdim=True).expand(-1, -1, -1, 12)
    bound = ungroup(largest, values.numel()).view_as(values) / 127
    # A scale that is rounded down by 2**-9 leaves the largest number out of reach by as much.
    assert ((rounded - values).abs() <= bound * (0.5 + 127 * 2**-9) * (1 + 1e-5)).all()
    assert 0.1 < ((rounded - values).abs() / bound).mean() < 0.3


def test_groups_are_the_twelve_numbers_of_a_line() -> None:
    numbers = group(torch.arange(2 * 768))
    # A lane's units of 8 numbers lie 256 apart; a line has one unit and half of the next.
    assert numbers[0, 0, 0].tolist() == [*range(8), *range(256, 260)]
    assert numbers[0, 0, 1].tolist() == [*range(260, 264), *range(512, 520)]
    assert numbers[1, 31, 1].tolist()[-1] == 2 * 768 - 1
    assert torch.equal(ungroup(numbers, 1500), torch.arange(1500))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_multiples_of_a_scale_are_kept(dtype: torch.dtype) -> None:
    values = torch.randint(-127, 128, (4, 3072)).to(dtype) * 2.0**-9
    values[:, ::4] = 127 * 2.0**-9
    assert torch.equal(round_to_int8(values), values.float())


def sums(communicator: Communicator) -> tuple[str, Tensor, Tensor, Tensor]:
    rounded = Rounded(communicator)
    values = torch.randn(communicator.world_size, 5, 777, generator=torch.Generator().manual_seed(1)).bfloat16()
    total = rounded.all_reduce(values[communicator.rank].clone())
    counts = rounded.all_reduce(torch.arange(300) * (communicator.rank + 1))
    return find_wrong_rounded_sums(rounded, torch.device("cpu")), values, total, counts


def test_ranks_on_the_cpu_add_rounded_numbers() -> None:
    (problem, values, total, counts), (_, _, other, _) = run_on_ranks(sums, 2)
    assert problem == ""
    assert torch.equal(total, other)
    assert torch.equal(total, (round_to_int8(values[0]) + round_to_int8(values[1])).bfloat16())
    assert not torch.equal(total, (values[0].float() + values[1].float()).bfloat16())
    assert torch.equal(counts, torch.arange(300) * 3)


def test_exact_sums_are_not_taken_for_rounded_ones() -> None:
    assert run_on_ranks(problem_of_exact, 2) == ["gave wrong sums of 16 bytes"] * 2


def problem_of_exact(communicator: Communicator) -> str:
    # Of eight numbers all may by chance be as near to their rounded ones as is allowed: not of these.
    torch.manual_seed(1)
    return find_wrong_rounded_sums(communicator, torch.device("cpu"))
