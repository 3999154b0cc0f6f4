"""Products of several inputs with a weight that is made block by block."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from parallel.kernels import grouping
from parallel.kernels.blocks import Block, products, products_ahead, products_at_once, side_by_side, whole, with_bias
from parallel.kernels.grouping import GroupedLinear
from parallel.layers.linear import RowParallelLinear
from parallel.layers.merged import MergedLinear, SideBySide


class Grouped(GroupedLinear):
    """A weight that is at hand, its columns in `order`."""

    def __init__(self, weight: Tensor, order: Tensor | None) -> None:
        super().__init__((len(weight), weight.shape[1]), order, max_rows=0)
        self.columns = weight if order is None else weight[:, order]

    def dequantize(self, outputs: slice) -> Tensor:
        return self.columns[outputs].clone()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "DEQUANTIZED_AT_A_TIME", 256 * 24)


@pytest.mark.parametrize("num_out", [128, 300, 640])
@pytest.mark.parametrize("is_ordered", [False, True])
def test_products_are_those_of_the_linear(num_out: int, is_ordered: bool) -> None:
    weight, bias = torch.randn(num_out, 24), torch.randn(num_out)
    linear = MergedLinear(Grouped(weight, torch.randperm(24) if is_ordered else None), bias)
    inputs = [torch.randn(rows, 24) for rows in (5, 1, 7)]
    found = list(products(linear.blocks(torch.float32), inputs))
    for rows, product in zip(inputs, found, strict=True):
        expected = rows.double() @ weight.double().t() + bias.double()
        torch.testing.assert_close(product.double(), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(product, linear(rows), rtol=0, atol=1e-4)


def test_linears_side_by_side_keep_their_own_order_and_bias() -> None:
    first, second, third = torch.randn(300, 24), torch.randn(7, 24), torch.randn(130, 24)
    bias, order = torch.randn(7), torch.randperm(24)
    blocks = side_by_side(
        [Grouped(first, order).blocks(torch.float32), with_bias(whole(second), bias), Grouped(third, None).blocks(
            torch.float32)]
    )  # fmt: skip
    rows = torch.randn(9, 24)
    expected = torch.cat([rows @ first.t(), rows @ second.t() + bias, rows @ third.t()], dim=1)
    torch.testing.assert_close(next(products(blocks, [rows])), expected, rtol=0, atol=1e-4)
    assert SideBySide([]).blocks(torch.float32) == []


def test_a_linear_says_for_how_many_rows_numbers_of_its_weight_are_made() -> None:
    class Few(Grouped):
        def multiply(self, rows: Tensor) -> Tensor:
            return torch.full((len(rows), self.num_out), float("nan"))

    weight = torch.randn(300, 24)
    packed = Few(weight, None)
    packed.max_rows = 4
    plain, merged = MergedLinear(weight, None), MergedLinear(packed, None)
    for linear, rows, dequantizes in ((plain, 9, False), (merged, 4, False), (merged, 5, True)):
        assert linear.dequantizes(rows) is dequantizes
        # By numbers what comes out is right, and it is not where the weight stays packed.
        assert linear(torch.zeros(rows, 24)).isnan().any() == (linear is merged and not dequantizes)
    sharded = [RowParallelLinear.__new__(RowParallelLinear) for _ in range(2)]
    for layer, its in zip(sharded, (None, packed), strict=True):
        torch.nn.Module.__init__(layer)
        layer.packed = its
    assert [layer.dequantizes(5) for layer in sharded] == [False, True]
    assert [SideBySide(sharded).dequantizes(rows) for rows in (4, 5)] == [False, True]


def traced(num_blocks: int) -> list[str]:
    """What happens when two inputs are multiplied by so many blocks, and their products taken one by one."""
    events: list[str] = []

    class Traced(Block):
        def multiply(self, rows: Tensor, weight: Tensor, output: Tensor) -> None:
            events.append(f"{'AB'[int(rows[0, 0])]} by {self.outputs.start}")

    def inputs() -> Iterator[Tensor]:
        for number in range(2):
            events.append(f"wait for {'AB'[number]}")
            yield torch.full((3, 4), float(number))

    def make(number: int) -> Tensor:
        events.append(f"make {number}")
        return torch.ones(1, 4)

    blocks = [Traced(slice(number, number + 1), lambda number=number: make(number)) for number in range(num_blocks)]
    for _ in products(blocks, inputs()):
        events.append("taken")
    return events


def test_a_product_can_be_used_before_the_next_input_is_asked_for() -> None:
    assert traced(1) == ["make 0", "wait for A", "A by 0", "taken", "wait for B", "B by 0", "taken"]


def test_of_several_blocks_each_is_made_once() -> None:
    assert traced(3) == [
        *("make 0", "wait for A", "A by 0", "wait for B", "B by 0"),
        *("make 1", "A by 1", "B by 1"),
        *("make 2", "A by 2", "taken", "B by 2", "taken"),
    ]


@pytest.mark.parametrize("num_out", [128, 640])
@pytest.mark.parametrize("num_ahead", [1, 2, 9])
def test_products_ahead_are_those_of_both_inputs(num_out: int, num_ahead: int) -> None:
    weight, bias = torch.randn(num_out, 24), torch.randn(num_out)
    blocks = MergedLinear(Grouped(weight, torch.randperm(24)), bias).blocks(torch.float32)
    inputs = [torch.randn(rows, 24) for rows in (5, 3)]
    expected = torch.cat(inputs).double() @ weight.double().t() + bias.double()
    ahead = products_ahead(blocks, inputs, (5, 3), num_ahead)
    torch.testing.assert_close(ahead.double(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cat(list(products_at_once(blocks, inputs))), ahead, rtol=0, atol=1e-4)


def test_the_first_input_goes_ahead_while_the_second_is_awaited() -> None:
    events: list[str] = []

    class Traced(Block):
        def multiply(self, rows: Tensor, weight: Tensor, output: Tensor) -> None:
            events.append(f"{ {3: 'A', 2: 'B', 5: 'both'}[len(rows)] } by {self.outputs.start}")

    def inputs() -> Iterator[Tensor]:
        for name, rows in (("A", 3), ("B", 2)):
            events.append(f"wait for {name}")
            yield torch.zeros(rows, 4)

    def make(number: int) -> Tensor:
        events.append(f"make {number}")
        return torch.ones(1, 4)

    blocks = [Traced(slice(number, number + 1), lambda number=number: make(number)) for number in range(3)]
    products_ahead(blocks, inputs(), (3, 2), 2)
    assert events == [
        *("make 0", "wait for A", "A by 0", "make 1", "A by 1", "wait for B", "B by 1"),
        *("make 2", "both by 2", "make 0", "B by 0"),
    ]
