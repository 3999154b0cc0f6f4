"""Which part of a pass of prompts a kernel belongs to, and what is said of sums that run beside other kernels."""

from __future__ import annotations

import random

import pytest

from launcher.report.bench_text import parts_table, prefill_text
from launcher.tasks.breakdown import Piece, part_of
from launcher.tasks.prefill_breakdown import PREFILL_PARTS, break_down_passes, busy_us
from parallel.engine.chunk_timer import chunk_lengths
from parallel.engine.limits import EngineLimits


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("dequantize_w4", "dequantize"),
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "products"),
        ("aten::mm", "products"),
        ("Memcpy HtoD (Pinned -> Device)", "all_reduce"),
        ("Memcpy DtoD (Device -> Device)", "other"),
        ("reduce_bfloat16", "all_reduce"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("add_rms_norm", "norms"),
    ],
)
def test_name_tells_the_part(name: str, part: str) -> None:
    assert part_of(name, PREFILL_PARTS) == part


def test_time_of_sums_is_split_into_hidden_and_alone() -> None:
    """A pass of 100 us, twice; the first one is dropped."""
    one = [
        ("rms_norm", 0.0, 10.0),
        ("nvjet", 10.0, 40.0),
        # 20 us beside the product, 10 alone; then 5 of 15 beside what nobody knows.
        ("reduce_bfloat16", 30.0, 30.0),
        ("odd", 70.0, 10.0),
        ("Memcpy HtoD", 75.0, 15.0),
        ("dequantize_w4", 98.0, 2.0),
    ]
    pieces = [Piece(name, 100.0 * number + start, us) for number in range(3) for name, start, us in one]
    pieces[0] = Piece("rms_norm", -500.0, 500.0)
    found = break_down_passes(pieces, 2)
    us = {name: part["us"] for name, part in found["parts"].items()}
    assert us == {
        **{"all_reduce": 45.0, "all_reduce_alone": 20.0, "dequantize": 2.0, "products": 40.0, "attention": 0.0},
        **{"norms": 10.0, "rotary": 0.0, "activation": 0.0, "other": 10.0, "between": 18.0},
    }
    assert found["pass_us"] == 100.0
    assert sum(us.values()) - us["all_reduce"] == pytest.approx(100)
    assert (found["other_us"], found["problem"]) == ({"odd": 10.0}, None)
    table, other = parts_table("prefill", found, "title")
    assert other == "other: odd 10"
    assert not isinstance(table, str) and table.row_count == len(us)


def test_passes_that_cannot_be_told_apart_give_nothing_but_why() -> None:
    found = break_down_passes([Piece("nvjet", float(n), 1.0) for n in range(7)], 2)
    assert found["parts"] is None
    assert parts_table("prefill", found, "") == [f"no breakdown of the prefill: {found['problem']}"]


def test_busy_time_counts_what_overlaps_once() -> None:
    draw = random.Random(1)
    spans = [(draw.randrange(200), draw.randrange(20)) for _ in range(30)]
    expected = len({us for start, length in spans for us in range(start, start + length)})
    assert busy_us([Piece("", float(start), float(length)) for start, length in spans]) == expected


def test_a_pass_reads_as_many_prompts_as_it_takes() -> None:
    assert chunk_lengths(EngineLimits(4096, 1, 2048), 3000) == [2048]
    assert chunk_lengths(EngineLimits(4096, 8, 2048), 600) == [600, 600, 600, 248]
    assert chunk_lengths(EngineLimits(4096, 2, 2048), 600) == [600, 600]


def test_pass_is_told_beside_one_without_sums() -> None:
    times = {"measured": 251.3, "without_all_reduce": 240.8}
    assert prefill_text({"tokens": 2048, "pass_ms": times}) == "prefill of 2,048 tokens 251 ms, 241 without all-reduces"
    alone = {"measured": 251.3, "without_all_reduce": None}
    assert prefill_text({"tokens": 2048, "pass_ms": alone}) == "prefill of 2,048 tokens 251 ms"
