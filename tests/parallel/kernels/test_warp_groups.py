"""What of products by warp groups shows without a card: the source run on the CPU, memory, and how tiles are dealt."""

from __future__ import annotations

import shutil

import pytest
import torch

from parallel.footprint import WIDE_WORKSPACE_BYTES
from parallel.kernels import warp_groups, wide
from parallel.kernels.multiprocessors import Card
from parallel.kernels.warp_groups import GroupLaunch
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
from tools.bench.linear_launches import GROUP_TILES

H200 = Card(132, 228 * 1024)
# What a card gives a block of its registers and of its shared memory, at most.
REGISTERS, SHARED_BYTES = 65536, 227 * 1024

# Blocks with whole tiles and a share of others, tiles half empty along either side, and every kind of weight.
CASES = {
    "bf16 scales": (lambda: draw(16, 128, dtype=torch.bfloat16, num_out=272), GroupLaunch(32, 8, 3), 300, 4),
    "float16 scales, zeros": (
        lambda: draw(16, 128, zeros=True, dtype=torch.float16, num_out=208),
        GroupLaunch(16, 12, 4),
        130,
        3,
    ),
    "float16 scales in 64s": (lambda: draw(16, 64, dtype=torch.float16, num_out=208), GroupLaunch(16, 8, 3), 70, 3),
    "zeros in 32s": (lambda: draw(16, 32, zeros=True, dtype=torch.bfloat16), GroupLaunch(32, 8, 3), 60, 2),
    "codebook": (codebook, GroupLaunch(8, 12, 4), 11, 2),
    "int8": (lambda: draw(256, NUM_IN, zeros=True), GroupLaunch(8, 8, 3), 100, 3),
    "int8 in 128s": (lambda: draw(256, 128, zeros=True, num_out=208), GroupLaunch(8, 12, 4), 64, 1),
    "float8": (float8, GroupLaunch(32, 8, 3), 33, 2),
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("name", CASES)
def test_the_source_computes_what_float64_does_whichever_block_is_last(name: str, early: bool) -> None:
    make, launch, num_rows, most = CASES[name]
    weight = make()
    layer, layout = layer_and_layout(weight)
    library = compile_source(
        "wide_wgmma.cu", ["-O1", "-DRUN_GROUPS", "-DSHARED_KIB=227", *launch.options(layout, H200)], early=early
    )
    rows = torch.randn(num_rows, NUM_IN).bfloat16()
    tiles, units = layer.packed.shape[:2]
    waves = warp_groups.plan_waves(wide.count_places(launch, tiles, num_rows), units, most)
    outputs = []
    for backwards in (0, 1):
        output = torch.full((num_rows + 1, tiles * 16), float("nan"), dtype=torch.bfloat16)
        parts = torch.full((2 * waves.sharing * waves.has_parts * launch.part_bytes // 4,), float("nan"))
        buffers = [layer.packed, layer.scales, getattr(layer, "codebook", None), rows, output, parts]
        sizes = tiles, units, num_rows, waves.blocks, waves.count, waves.sharing
        assert library.run_groups(*map(pointer, buffers), *sizes, backwards) == 0
        assert output[-1].isnan().all()
        outputs.append(output[:-1])
    assert torch.equal(*outputs)
    # Weights with scales in groups are rounded to bf16.
    exact, is_rounded = weight.dequantize(torch.float64), layout.scale_bytes > 0
    expected = rows.double() @ (exact.bfloat16().double() if is_rounded else exact).t()
    allowed = expected.abs() * 2**-8 + expected.abs().mean() * (1.5e-2 if is_rounded else 2e-3)
    assert ((outputs[0].double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("name", FORMATS)
def test_every_launch_keeps_a_unit_ahead_in_shared_memory(name: str) -> None:
    layout = FORMATS[name].wide_layout()
    for launch in wide.GROUP_LAUNCHES.values():
        token_stages, weight_stages = launch.fit(layout, H200)
        assert token_stages >= 5 and weight_stages >= 3
        assert launch.shared_bytes(layout, H200) <= SHARED_BYTES
        # Of 64 inputs of a token in bf16, and of 128 inputs of 16 outputs.
        assert launch.shared_bytes(layout, H200) >= (
            token_stages * launch.tokens * 128 + weight_stages * launch.tiles * layout.unit_bytes
        )


def test_what_is_tuned_includes_what_is_chosen() -> None:
    assert {(launch.token_tiles, launch.out_warps) for launch in wide.GROUP_LAUNCHES.values()} <= set(GROUP_TILES)
    for token_tiles, out_warps in GROUP_TILES:
        threads = warp_groups.GroupLaunch(token_tiles, out_warps, 3).threads
        # Sums, and as many registers as two decoded turns, their words and addresses take.
        assert (4 * token_tiles + 80) * 32 * out_warps + 24 * warp_groups.COPIERS <= REGISTERS
        assert REGISTERS // threads >= 104


@pytest.mark.parametrize("most", [1, 116, 132])
@pytest.mark.parametrize("units", [1, 3, 64, 112])
def test_each_unit_is_one_blocks_and_parts_are_made_room_for(units: int, most: int) -> None:
    """As wide_wgmma.cu deals them."""
    for places in (1, 2, 63, 66, 132, 133, 197, 198, 200, 263, 264, 1792):
        waves = warp_groups.plan_waves(places, units, most)
        assert 1 <= waves.sharing <= waves.blocks <= most
        assert places == waves.count * waves.blocks + waves.rest if waves.count else places == waves.rest
        total = waves.rest * units
        ends = [total * min(block, waves.sharing) // waves.sharing for block in range(waves.blocks + 1)]
        assert ends[0] == 0 and ends[-1] == total
        shares = [ends[block + 1] - ends[block] for block in range(waves.sharing)]
        assert max(shares) - min(shares) <= 1 and (min(shares) > 0 or waves.rest == 0)
        # A block that begins or ends within a tile leaves a part of it.
        assert waves.has_parts or all(end % units == 0 for end in ends)


@pytest.mark.parametrize("num_rows", [49, 64, 100, 128, 129, 256, 300, 2048])
def test_parts_take_no_more_memory_than_is_planned(num_rows: int) -> None:
    launch = wide.choose_launch(num_rows, wide.SM90_LAUNCHES)
    assert isinstance(launch, warp_groups.GroupLaunch)
    most = WIDE_WORKSPACE_BYTES // (2 * launch.part_bytes)
    assert most >= H200.multiprocessors
    # Tiles of Y that are dealt are counted.
    for num_tiles in (1, 65, 320, 1792, 8016):
        waves = warp_groups.plan_waves(wide.count_places(launch, num_tiles, num_rows), 64, H200.multiprocessors)
        assert waves.rest < 2 * H200.multiprocessors <= wide.MAX_TILES


def test_boxes_of_scales_hold_those_that_all_inputs_share() -> None:
    sizes = {name: warp_groups.scale_bytes(own.wide_layout()) for name, own in FORMATS.items()}
    assert sizes["int8"] == sizes["fp8"] == sizes["int8-g128"] == 16 * torch.float32.itemsize
    # 40 bytes begin in the middle of 16 every other time.
    assert sizes["w4-zeros"] == 48 and sizes["w4-g32"] == 160
