"""Up to how many rows linears multiply by packed weights: chosen by given times, alike on all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from parallel.checkpoint.dummy import fill_dummy
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.communicator import Communicator
from parallel.footprint import MIN_FUSED_ROWS
from parallel.kernels import choice, w4a16
from parallel.kernels.grouping import GroupedLinear
from parallel.kernels.w4a16 import W4A16Linear
from parallel.kernels.w8a16 import W8A16Linear
from parallel.layers.linear import RowParallelLinear
from parallel.layers.merged import LayerMerger, MergedLinear
from parallel.product_trial import (
    TRIAL_WEIGHTS,
    TRIED_ROWS,
    FusedRows,
    choose_limit,
    rows_limit,
    trial_linear,
    try_linear,
)
from parallel.shard import build_sharded_model
from parallel.transports.solo import Solo
from tests.parallel.ranks import CPU, run_on_ranks

Times = tuple[tuple[float, ...], tuple[float, ...]]
EVEN = (2.0, 3.0, 5.0, 9.0)
# What an H200 took of 80 layers, and what is expected of an RTX 4090.
H200 = (52.6, 107.2, 214.0, 428.0), (55.6, 71.7, 120.8, 216.3)
RTX4090 = (138.0, 275.0, 550.0, 1100.0), (292.0, 414.0, 659.0, 1150.0)


class Recorded(W4A16Linear):
    """Writes down which way rows are multiplied, and how many."""

    def __init__(self) -> None:
        GroupedLinear.__init__(self, (16, 8), None, max_rows=MIN_FUSED_ROWS)
        self.last = ("", 0)

    def multiply(self, rows: Tensor) -> Tensor:
        self.last = ("packed", len(rows))
        return rows

    def multiply_dequantized(self, rows: Tensor) -> Tensor:
        self.last = ("dequantized", len(rows))
        return rows


def timer_of(linear: Recorded, times: Times) -> Callable[[Callable[[], object]], float]:
    """Of a card on which the ways take so long at each of TRIED_ROWS; whatever loads kernels takes longer."""
    table = {("packed", "dequantized")[way]: dict(zip(TRIED_ROWS, each, strict=True)) for way, each in enumerate(times)}
    seen = set()

    def measure(call: Callable[[], object]) -> float:
        call()
        way, rows = linear.last
        is_first = linear.last not in seen
        seen.add(linear.last)
        return table[way][rows] + 1000.0 * is_first

    return measure


def choose(communicator: Communicator, times_by_rank: list[Times | None]) -> FusedRows:
    times = times_by_rank[communicator.rank]
    if times is None:
        return try_linear(torch.nn.Linear(8, 16), communicator, CPU, lambda call: 0.0)
    linear = Recorded()
    return try_linear(linear, communicator, CPU, timer_of(linear, times))


@pytest.mark.parametrize(
    ("packed", "dequantized", "limit"),
    [
        (*H200, 256),
        (*RTX4090, 2048),
        ((1.0, 2.0, 4.0, 9.5), EVEN, 1024),
        # Not beyond a size at which it is slower, whatever comes after; and never below what all cards do.
        ((1.0, 4.0, 4.0, 8.0), EVEN, 256),
        ((3.0, 2.0, 4.0, 8.0), EVEN, 256),
        (EVEN, EVEN, 256),
    ],
)
def test_the_limit_is_where_the_packed_weight_stops_being_faster(
    packed: tuple[float, ...], dequantized: tuple[float, ...], limit: int
) -> None:
    found = choose(Solo(CPU), [(packed, dequantized)])
    assert found.limit == limit == rows_limit(found)
    assert found.packed_ms == dict(zip(TRIED_ROWS, packed, strict=True))
    assert found.dequantized_ms == dict(zip(TRIED_ROWS, dequantized, strict=True))
    # Both times at the limit, and at the next size, where there is one.
    at = TRIED_ROWS.index(limit)
    for place in range(at, min(at + 2, len(TRIED_ROWS))):
        words = f"{packed[place]:.2f} ms for {TRIED_ROWS[place]} rows with a packed weight, {dequantized[place]:.2f} ms"
        assert words in found.reason


def test_without_a_trial_it_is_what_all_cards_do() -> None:
    assert rows_limit(None) == MIN_FUSED_ROWS == choose_limit({256: math.inf}, {256: math.inf}).limit


def test_ranks_choose_alike_by_the_slowest() -> None:
    fast, slow_packed, slow_other = RTX4090, ((138.0, 275.0, 700.0, 1100.0), RTX4090[1]), (RTX4090[0], (400.0,) * 4)
    first, *others = run_on_ranks(choose, 2, [fast, slow_packed])
    assert first.limit == 512 and first.packed_ms[1024] == 700.0
    assert others == [first]
    # What dequantises slowly on one rank is slow for all.
    assert [found.limit for found in run_on_ranks(choose, 2, [H200, slow_other])] == [512, 512]


def test_a_rank_without_the_kernel_keeps_all_from_using_it() -> None:
    found = run_on_ranks(choose, 2, [RTX4090, None])
    assert found == [FusedRows(MIN_FUSED_ROWS, "a rank cannot multiply by the packed weight")] * 2


def take_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card; what packs there runs here too."""
    kernels = {"w4a16": W4A16Linear, "w8a16": W8A16Linear}
    taken = {name: replace(choice.KERNELS[name], refusal=refuse_other_bits(name)) for name in kernels}
    monkeypatch.setattr(choice, "KERNELS", {**choice.KERNELS, **taken})


def refuse_other_bits(name: str) -> Callable[..., str | None]:
    bits = {"w4a16": 4, "w8a16": 8}[name]
    return lambda weight, dtype: None if weight.bits == bits else f"{weight.bits} bits"


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_the_weight_of_a_trial_has_the_outputs_of_the_linear_or_as_many_as_are_allowed(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    take_all(monkeypatch)
    monkeypatch.setattr("parallel.product_trial.TRIAL_WEIGHTS", 3000 * 256)
    monkeypatch.setattr("parallel.product_trial.PART_OUTPUTS", 512)
    found = {}
    for num_out in (64, 1500, 9999):
        linear = trial_linear(QUANTIZE_SCHEMES[kind], num_out, 256, CPU)
        assert isinstance(linear, W4A16Linear | W8A16Linear)
        assert linear.packed.shape[0] * 16 == linear.num_out and linear.num_in == 256
        found[num_out] = linear.num_out
    assert found == {64: 64, 1500: 1024, 9999: 2560}


def test_the_weight_of_a_trial_is_random_and_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    take_all(monkeypatch)
    monkeypatch.setattr("parallel.product_trial.PART_OUTPUTS", 32)
    linear = trial_linear(QUANTIZE_SCHEMES["int4"], 96, 256, CPU)
    assert isinstance(linear, W4A16Linear)
    weight = w4a16.unpack_weight(linear.packed, linear.scales)
    assert weight.isfinite().all() and weight[:32].unique(dim=0).shape[0] == 32
    assert all(torch.equal(weight[start : start + 32], weight[:32]) for start in (32, 64))
    # 64 MiB of 4 bits.
    assert TRIAL_WEIGHTS // 2 == 64 * 1024**2


def limits_of_linears(communicator: Communicator, kind: str, fused_rows: int) -> dict[str, tuple[int, bool, bool]]:
    """Of each packed linear of a small model: its limit, and whether so many rows, and one more, dequantise it."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=64,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as monkeypatch:
        take_all(monkeypatch)
        model = build_sharded_model(config, communicator, dtype=torch.bfloat16, grain=128, fused_rows=fused_rows)
        fill_dummy(model, QUANTIZE_SCHEMES[kind], CPU, on_placed=LayerMerger(model.module))
    linears = {
        name: layer
        for name, layer in model.module.named_modules()
        if isinstance(layer, MergedLinear | RowParallelLinear)
    }
    packed = {
        name: layer.multiply if isinstance(layer, MergedLinear) else layer.packed for name, layer in linears.items()
    }
    asked = (fused_rows, fused_rows + 1)
    return {name: (packed[name].max_rows, *map(layer.dequantizes, asked)) for name, layer in linears.items()}  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_the_limit_reaches_every_linear_of_a_model(kind: str) -> None:
    for found in run_on_ranks(limits_of_linears, 2, kind, 777):
        assert len(found) == 2 * 4
        assert set(found.values()) == {(777, False, True)}
