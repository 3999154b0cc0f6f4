"""What of the products by warp groups shows without a card: their shared memory, and how tiles are dealt to blocks."""

from __future__ import annotations

import pytest
import torch

from parallel.footprint import WIDE_WORKSPACE_BYTES
from parallel.kernels import warp_groups, wide
from parallel.kernels.multiprocessors import Card
from tools.linear_formats import FORMATS
from tools.linear_launches import GROUP_TILES

H200 = Card(132, 228 * 1024)
# What a card gives a block of its registers and of its shared memory, at most.
REGISTERS, SHARED_BYTES = 65536, 227 * 1024


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
