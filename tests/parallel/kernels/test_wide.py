"""What of the kernel for many rows shows without a card: its source run on the CPU, and how its tiles are dealt."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from parallel.footprint import MIN_FUSED_ROWS, WIDE_WORKSPACE_BYTES
from parallel.kernels import w4a16, w8a16, wide
from parallel.kernels.multiprocessors import ALIGNED_SHARE, RESERVED_SHARED_BYTES, Card
from parallel.kernels.wide import Launch
from tests.parallel.kernels.test_emulated_kernels import (
    NUM_IN,
    codebook,
    compile_source,
    draw,
    float8,
    layer_and_layout,
    pointer,
)
from tools.bench.linear_formats import FORMATS
from tools.bench.linear_launches import wide_launches

RTX4090, H200 = Card(128, 100 * 1024), Card(132, 228 * 1024)
LAYOUTS = {
    **{
        f"4 bits, {size}, {name}": w4a16.find_layout(size, width, dtype, has_codebook=False)
        for size in (128, 64, 32)
        for name, width, dtype in (
            ("symmetric", 16, torch.bfloat16),
            ("zeros", 20, torch.float16),
            ("float32", 16, torch.float32),
        )
    },
    "8 bits": w8a16.wide_layout(is_grouped=False, is_float=False),
    "8 bits, 128": w8a16.wide_layout(is_grouped=True, is_float=True),
}
# Outputs and tokens that leave tiles half empty; tiles that blocks share, and blocks of several tiles.
CASES = {
    "4 bits": (lambda: draw(16, 128, zeros=True), Launch(2, 2, 2, 2, 3, 1), 40, 3),
    "4 bits in 32s": (lambda: draw(16, 32, zeros=True), Launch(1, 3, 4, 1, 2, 1), 3, 3),
    "bf16 scales": (lambda: draw(16, 128, dtype=torch.bfloat16), Launch(2, 2, 2, 2, 3, 1), 19, 3),
    "float16 scales in 64s": (lambda: draw(16, 64, dtype=torch.float16), Launch(2, 2, 4, 1, 2, 1), 16, 2),
    "float16 scales, zeros": (lambda: draw(16, 128, zeros=True, dtype=torch.float16), Launch(1, 2, 2, 2, 3, 1), 17, 4),
    # As many row tiles as threads copy scales of at a time, threads left over, and more tiles that these could copy.
    "bf16 scales, zeros": (
        lambda: draw(16, 32, zeros=True, dtype=torch.bfloat16, num_out=208),
        Launch(1, 3, 4, 1, 2, 1),
        5,
        3,
    ),
    "codebook": (codebook, Launch(1, 1, 2, 2, 4, 1), 11, 4),
    "int8": (lambda: draw(256, 128, zeros=True), Launch(1, 2, 1, 4, 2, 1), 36, 7),
    # More rows than any tile takes: many tiles of tokens.
    "many rows": (lambda: draw(16, 128, zeros=True), Launch(2, 2, 2, 2, 3, 1), 300, 5),
    "float8": (float8, Launch(3, 1, 4, 1, 2, 1), 25, 2),
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("early", [False, True], ids=["late copies", "early copies"])
@pytest.mark.parametrize("name", CASES)
def test_the_source_computes_what_float64_does_whichever_block_is_last(name: str, early: bool) -> None:
    make, launch, num_rows, num_blocks = CASES[name]
    weight = make()
    layer, layout = layer_and_layout(weight)
    options = ["-DRUN_WIDE", *launch.options(launch.stages), *layout.options]
    library = compile_source("wide.cu", options, early=early)
    rows = torch.randn(num_rows, NUM_IN).bfloat16()
    tiles, units = layer.packed.shape[:2]

    def run(backwards: int) -> torch.Tensor:
        output = torch.full((num_rows, tiles * 16), float("nan"), dtype=torch.bfloat16)
        workspace = torch.full((2 * num_blocks * launch.part_bytes // 4,), float("nan"))
        buffers = [layer.packed, layer.scales, getattr(layer, "codebook", None), rows, output, workspace]
        library.run_wide(*map(pointer, buffers), tiles, units, num_rows, num_blocks, backwards)
        return output

    output = run(backwards=0)
    expected = rows.double() @ weight.dequantize(torch.float64).t()
    allowed = expected.abs() * 2**-8 + expected.abs().mean() * 2e-3
    assert ((output.double() - expected).abs() <= allowed).all()
    assert torch.equal(run(backwards=1), output)


def test_four_neighbours_of_two_tokens_read_from_all_banks_and_copies_write_to_them() -> None:
    """Shared memory serves 8 lanes of 16 bytes at a time, where they lie in 8 different sixteens of 128 bytes."""

    def sixteen(token: int, piece: int) -> int:
        return token * wide.TOKEN_BYTES // 16 + (piece ^ (token & 1) << 2)

    for first in range(0, 32, 8):
        lanes = [(lane // 4, lane % 4) for lane in range(first, first + 8)]
        for quarter in range(4):
            assert len({sixteen(g, quarter * 4 + c) % 8 for g, c in lanes}) == 8
        assert len({sixteen(1, first % 16 + i) % 8 for i in range(8)}) == 8
    # A permutation: nothing is overwritten.
    assert len({sixteen(token, piece) for token in range(8) for piece in range(16)}) == 128


@pytest.mark.parametrize("card", [RTX4090, H200], ids=["RTX 4090", "H200"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_launch_fits_the_cards_and_its_rows(name: str, card: Card) -> None:
    unit_bytes = LAYOUTS[name].unit_bytes
    for num_rows in (*range(1, MIN_FUSED_ROWS + 1), 257, 1000, 2048, 10_000):
        launch = wide.choose_launch(num_rows)
        stages, blocks = wide.fit(launch, unit_bytes, card)
        shared_bytes = stages * launch.stage_bytes(unit_bytes)
        assert stages >= 2
        assert shared_bytes + RESERVED_SHARED_BYTES <= card.shared_bytes // blocks
        # No more than the last tile of tokens is partly empty.
        assert -(-num_rows // launch.tokens) * launch.tokens - num_rows < max(launch.tokens, 16)


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_tune_tries_fits_the_smaller_card_and_includes_what_is_chosen(name: str) -> None:
    for num_rows in wide.LAUNCHES:
        tried = wide_launches(FORMATS[name], num_rows)
        assert wide.choose_launch(num_rows) in tried
        for launch in tried:
            assert wide.fit(launch, FORMATS[name].wide_layout().unit_bytes, RTX4090)[0] >= 2
            assert launch.threads in (128, 256)


@pytest.mark.parametrize("num_tiles", [1, 65, 160, 320, 512, 1792, 3584, 8016])
@pytest.mark.parametrize("num_rows", [17, 64, 256, 257, 1000, 2048])
def test_blocks_share_the_units_of_all_tiles_within_the_planned_memory(num_rows: int, num_tiles: int) -> None:
    launch, units = wide.choose_launch(num_rows), 64
    places = wide.count_places(launch, num_tiles, num_rows)
    blocks = wide.count_blocks(launch, LAYOUTS["4 bits, 128, zeros"].unit_bytes, places, units, H200)
    assert 1 <= blocks <= places * units
    assert places <= wide.MAX_TILES
    floats = wide.workspace_floats(launch, places, blocks)
    assert floats * 4 <= WIDE_WORKSPACE_BYTES
    # Without one, every block's share ends where a tile does.
    assert floats > 0 or all(places * units * block // blocks % units == 0 for block in range(blocks))
    assert blocks >= ALIGNED_SHARE * min(launch.blocks * H200.multiprocessors, places * units) or floats == 0


@pytest.mark.parametrize("num_tiles", [1, 65])
def test_no_launch_has_more_tiles_than_are_counted(monkeypatch: pytest.MonkeyPatch, num_tiles: int) -> None:
    weight, layout = torch.randn(num_tiles * 16, 8), LAYOUTS["8 bits"]
    packed, seen = torch.zeros(num_tiles, 1), []

    def run_kernel(launch: Launch, rows: torch.Tensor, *others: Any) -> None:
        seen.append(wide.count_places(launch, num_tiles, len(rows)))
        others[3][:] = rows @ weight.t()

    monkeypatch.setattr(wide, "run_kernel", run_kernel)
    monkeypatch.setattr(wide, "launches_for", lambda *_: wide.LAUNCHES)
    monkeypatch.setattr(wide, "MAX_TILES", 3 * -(-num_tiles // 8))
    for num_rows in (384, 385, 1000):
        rows, output = torch.randn(num_rows, 8), torch.full((num_rows, len(weight)), float("nan"))
        wide.multiply(rows, packed, packed, None, output, layout)
        torch.testing.assert_close(output, rows @ weight.t())
        assert max(seen) == wide.MAX_TILES
    assert len(seen) == 1 + 2 + 3


def test_numbers_of_units_fit_their_type() -> None:
    """Of 57344 inputs, more than any linear of a 405B has."""
    assert wide.MAX_TILES * (57344 // 128) < 2**31
