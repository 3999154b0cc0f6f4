"""What an RTX 4090 is asked to run: every kernel of ours, with the options and the threads that it is started with.

Kernels are compiled by the product's own way to NVRTC, for a card that is only said to be there.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count, product
from types import SimpleNamespace
from unittest.mock import patch

import torch

from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.footprint import W4A16_GROUP_SIZES
from parallel.kernels import (
    attention_launch,
    dequantize_host,
    dequantize_packed,
    fused,
    host_int4,
    launch,
    pack_eight_bits,
    pack_four_bits,
    paged_attention,
    round_groups,
    tiles,
    w4a16,
    w8a16,
    wide,
)
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.multiprocessors import Card
from parallel.kernels.nvrtc import compile_source
from parallel.kernels.packed_layout import Layout
from parallel.kernels.pages import FP8
from parallel.layers.merged import MAX_SWIGLU_ROWS
from parallel.transports import channel, copies, copy_streams, dense, host_memory, two_step
from parallel.transports import host_memory_norm as norm
from tests.parallel.kernels.nvrtc_wheel import find_nvrtc

# Of compute capability 8.9 (CUDA Programming Guide, Technical Specifications per Compute Capability).
CARD = Card(multiprocessors=128, shared_bytes=100 * 1024)
SHARED_BYTES_OF_BLOCK = 99 * 1024
# What a block takes of a multiprocessor's shared memory beside its own.
RESERVED_SHARED_BYTES = 1024
THREADS, BLOCKS, REGISTERS = 1536, 24, 64 * 1024
# Registers are given to a warp by so many, and warps are spread over so many schedulers.
REGISTERS_AT_ONCE, SCHEDULERS, WARP = 256, 4, 32
# No card that a test could have, so that what is kept for it is in nobody's way.
DEVICE = torch.device("cuda", 89)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
REDUCTIONS = tuple(channel.REDUCTIONS.values())
SOURCES = [path for folder in (tiles.FOLDER, channel.FOLDER) for path in folder.glob("*.cu")]
# Of models; one of a prime number of warps, whose rows are shared by as many blocks; the largest.
HIDDEN_SIZES = (2048, 4096, 5120, 8192, 9728, fused.MAX_HIDDEN)


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel takes: registers of a thread, memory that these were too few for, and shared memory."""

    registers: int
    stack_bytes: int
    static_bytes: int
    dynamic_bytes: int = 0

    @property
    def shared_bytes(self) -> int:
        return self.static_bytes + self.dynamic_bytes

    def resident(self, threads: int) -> int:
        """Blocks that a multiprocessor holds at a time."""
        warps = -(-threads // WARP)
        of_a_warp = -(-self.registers * WARP // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
        most_warps = REGISTERS // of_a_warp // SCHEDULERS * SCHEDULERS
        by_shared = CARD.shared_bytes // (self.shared_bytes + RESERVED_SHARED_BYTES)
        return min(most_warps // warps, by_shared, THREADS // threads, BLOCKS)


@dataclass(frozen=True)
class Use:
    """A kernel as the product loads it and starts it. The first word of `name` is that of its file.

    `blocks`: that the launch counts on for a multiprocessor. `grid`: that must all be on the card at a time, since they
    wait for one another, or for those of another card.
    """

    name: str
    load: Callable[[], launch.Kernel]
    threads: int
    blocks: int = 1
    grid: int = 0


class Nvrtc:
    """Stands for the driver: keeps what each kernel that is loaded takes, in place of its code."""

    def __init__(self) -> None:
        self.taken: dict[int, Compiled] = {}
        self.handles = count(1)

    def compile(self, source: str, name: str, options: tuple[str, ...], capability: str) -> bytes:
        return compile_log(source, options, capability)

    def load(self, log: bytes, names: list[str]) -> dict[str, SimpleNamespace]:
        registers, stack_bytes, static_bytes = read_log(log.decode(), names[0])
        handle = next(self.handles)
        self.taken[handle] = Compiled(registers, stack_bytes, static_bytes)
        loaded = SimpleNamespace(func=ctypes.c_void_p(handle), set_shared_memory_config=lambda num_bytes: None)
        return {names[0]: loaded}

    def measure(self, use: Use) -> Compiled:
        kernel = use.load()
        return replace(self.taken[kernel.function], dynamic_bytes=kernel.shared_bytes)


@cache
def compile_log(source: str, options: tuple[str, ...], capability: str) -> bytes:
    """What ptxas says of all kernels of a source."""
    arguments = [f"--gpu-architecture=sm_{capability}", *options, "--ptxas-options=-v"]
    return compile_source(source, "kernel", arguments)[1].encode()


def read_log(log: str, name: str) -> tuple[int, int, int]:
    """Registers, bytes of stack frames and spills, static shared memory, of what ptxas says of one kernel."""
    properties = re.search(rf"Function properties for {name}\n(.*)\n.*: Used (.*)", log)
    assert properties, log
    memory = sum(int(number) for number in re.findall(r"(\d+) bytes", properties[1]))
    shared = re.search(r"(\d+) bytes smem", properties[2])
    return int(properties[2].split()[0]), memory, int(shared[1]) if shared else 0


def problem(use: Use, taken: Compiled) -> str:
    """What of a kernel is too much for the card; empty: nothing."""
    resident = taken.resident(use.threads)
    checks = {
        f"{taken.stack_bytes} bytes of registers in memory": taken.stack_bytes == 0,
        f"{taken.shared_bytes} bytes of shared memory": taken.shared_bytes <= SHARED_BYTES_OF_BLOCK,
        f"{resident} blocks on a multiprocessor of {use.blocks}": resident >= use.blocks,
        f"{resident * CARD.multiprocessors} blocks on the card of {use.grid}": (
            resident * CARD.multiprocessors >= use.grid
        ),
    }
    return ", ".join(found for found, passed in checks.items() if not passed)


@contextmanager
def pretended_card() -> Iterator[Nvrtc]:
    """torch says that there is such a card, and kernels that are loaded for it are compiled, and no more."""
    nvrtc = Nvrtc()
    major, minor = 8, 9
    properties = SimpleNamespace(
        major=major,
        minor=minor,
        multi_processor_count=CARD.multiprocessors,
        shared_memory_per_multiprocessor=CARD.shared_bytes,
    )
    with ExitStack() as stack:
        for target, attribute, value in (
            (torch.cuda, "get_device_capability", lambda device=None: (major, minor)),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (torch.cuda, "device", lambda device: nullcontext()),
            (launch, "read_or_compile", nvrtc.compile),
            (launch, "open_driver", lambda: SimpleNamespace(cuLaunchKernel=None, cuLaunchKernelEx=None)),
            (launch.cuda_utils, "_cuda_load_module", nvrtc.load),
            (launch.cuda_utils, "_get_gpu_rtc_library", find_nvrtc),
        ):
            stack.enter_context(patch.object(target, attribute, value))
        yield nvrtc


# What the product asks for.


def every_use() -> list[Use]:
    return [*linears(), *attention(), *layers(), *packing(), *transports()]


def four_bit_layouts(*, swiglu: bool) -> Iterator[tuple[str, Layout]]:
    for group_size in W4A16_GROUP_SIZES:
        for width, dtype in ((16, F32), (16, BF16), (20, BF16), (16, F16), (20, F16)):
            layout = w4a16.find_layout(group_size, width, dtype, has_codebook=False, swiglu=swiglu)
            yield f"{group_size}-{width}-{str(dtype).removeprefix('torch.')}", layout
        yield f"{group_size}-codebook", w4a16.find_layout(group_size, 16, F32, has_codebook=True, swiglu=swiglu)


def eight_bit_layouts(*, swiglu: bool) -> Iterator[tuple[str, Layout]]:
    for grouped, is_float in product((False, True), repeat=2):
        layout = w8a16.wide_layout(is_grouped=grouped, is_float=is_float, swiglu=swiglu)
        yield f"{'e4m3' if is_float else 'int8'}{'-groups' * grouped}", layout


def narrow_launches(launches: tiles.Launches) -> set[tiles.Launch]:
    """For any number of rows and of tiles."""
    every = range(1, 2 + max(least for listed in launches.values() for least, *_ in listed))
    step = 2 if all(row_tiles > 1 for listed in launches.values() for _, row_tiles, *_ in listed) else 1
    return {
        tiles.choose_launch(launches, rows, num_tiles) for rows in launches for num_tiles in every[step - 1 :: step]
    }


def linears() -> Iterator[Use]:
    index = DEVICE.index
    for swiglu in (False, True):
        suffix = " swiglu" * swiglu
        for kind, layout in four_bit_layouts(swiglu=swiglu):
            for each in narrow_launches(w4a16.launches_for(has_codebook=layout.has_codebook, swiglu=swiglu)):
                load = partial(w4a16.multiply_kernel, each, layout, index)
                yield Use(f"w4a16 {kind}{suffix} {describe(each)}", load, each.warps * WARP)
        for kind, layout in eight_bit_layouts(swiglu=swiglu):
            for each in narrow_launches(w8a16.launches_for(swiglu=swiglu)):
                load = partial(w8a16.multiply_kernel, each, layout, index)
                yield Use(f"w8a16 {kind}{suffix} {describe(each)}", load, each.warps * WARP)
        for kind, layout in (*four_bit_layouts(swiglu=swiglu), *eight_bit_layouts(swiglu=swiglu)):
            for most, many in wide.launches_for(layout, 64, index).items():
                assert isinstance(many, wide.Launch)
                if swiglu and most > MAX_SWIGLU_ROWS:
                    break
                blocks = wide.fit(many, layout.unit_bytes, CARD)[1]
                load = partial(wide.compile_kernel, many, layout, index)
                yield Use(f"wide {kind}{suffix} {most} rows", load, many.threads, blocks)
    for kind, layout in (*four_bit_layouts(swiglu=False), *eight_bit_layouts(swiglu=False)):
        load = partial(dequantize_packed.compile_kernel, layout, index)
        yield Use(f"dequantize_packed {kind}", load, dequantize_packed.WARPS * WARP)


def describe(narrow: tiles.Launch) -> str:
    return f"{narrow.token_tiles}x{narrow.row_tiles} tiles {narrow.warps} warps"


def attention() -> Iterator[Use]:
    columns = range(8, 8 * attention_launch.MAX_COLUMN_TILES + 1, 8)
    for head_dim, num_columns, dtype, fp8, tree in product(
        paged_attention.HEAD_DIMS, columns, (BF16, F16), (False, True), (False, True)
    ):
        each = attention_launch.choose_launch(head_dim, num_columns, dtype, FP8 if fp8 else dtype, tree=tree)
        name = f"paged_attention {head_dim} {str(dtype)[6:]}{' fp8' * fp8}{' tree' * tree} {num_columns} columns"
        # Two of these may share a multiprocessor where one's rings leave room; it counts on one (choose_splits).
        blocks = attention_launch.BLOCKS_PER_MULTIPROCESSOR
        yield Use(name, partial(paged_attention.load, each, DEVICE.index), each.warps * WARP, blocks)


def layers() -> Iterator[Use]:
    for hidden_size in HIDDEN_SIZES:
        load = partial(first_of, fused.norm_kernel, fused.NORM_VECTORS, hidden_size, DEVICE)
        pieces, vectors = hidden_size // fused.PIECE, fused.NORM_VECTORS
        yield Use(f"fused_norm {hidden_size}", load, -(-pieces // (vectors * WARP)) * WARP)
    yield Use("fused_silu", partial(fused.silu_kernel, DEVICE), fused.SILU_THREADS)
    for head_dim, dtype in product(fused.HEAD_DIMS, (BF16, FP8)):
        load = partial(first_of, fused.rotary_kernel, head_dim, PAGE_SIZE, dtype, DEVICE)
        yield Use(f"fused_rotary {head_dim} {str(dtype)[6:]}", load, fused.ROTARY_THREADS)


def first_of(load: Callable[..., tuple[launch.Kernel, ...]], *arguments: object) -> launch.Kernel:
    return load(*arguments)[0]


def packing() -> Iterator[Use]:
    for in_pairs in (False, True):
        load = partial(pack_four_bits.compile_kernel, DEVICE.index, in_pairs=in_pairs)
        yield Use(f"pack_four_bits in_pairs={in_pairs}", load, pack_four_bits.WARPS * WARP)
    for is_float in (False, True):
        load = partial(pack_eight_bits.compile_kernel, DEVICE.index, is_float=is_float)
        yield Use(f"pack_eight_bits {is_float=}", load, pack_eight_bits.WARPS * WARP)
    for (name, scheme), dtype in product(QUANTIZE_SCHEMES.items(), round_groups.STORED):
        load = partial(round_groups.compile_kernel, scheme, dtype, DEVICE.index)
        yield Use(f"round_groups {name} of {dtype}", load, round_groups.WARPS * WARP)
    for block in host_int4.OUTPUTS_PER_BLOCK:
        load = partial(dequantize_host.compile_kernel, block, DEVICE.index)
        yield Use(f"dequantize_host {block}", load, dequantize_host.THREADS)


def transports() -> Iterator[Use]:
    """With the most threads and blocks that each is started with."""
    for source, names, parameters, threads, grid in (
        *((lines.source, [channel.REDUCTIONS[each] for each in lines.dtypes], channel.PARAMETERS, warps * WARP, blocks)
          for lines in (dense.EXACT, dense.INT8) for _, blocks, warps in lines.launches),
        *((host_memory.SlotChannel.source, host_memory.SlotChannel.names, channel.PARAMETERS, threads, blocks)
          for _, blocks, threads in host_memory.LAUNCHES),
        (two_step.TwoStepChannel.source, REDUCTIONS, channel.PARAMETERS, two_step.THREADS, two_step.BLOCKS),
        (copies.CopyChannel.source, REDUCTIONS, copy_streams.PARAMETERS, copy_streams.THREADS, 0),
        *((norm.NormChannel.source, norm.NormChannel.names, norm.PARAMETERS, *norm_launch(hidden_size))
          for hidden_size in HIDDEN_SIZES),
    ):  # fmt: skip
        for name, world_size in product(names, range(2, host_memory.MAX_RANKS + 1)):
            options = (f"-DWORLD={world_size}",)
            load = partial(launch.load_kernel, channel.FOLDER / source, name, options, parameters, DEVICE.index)
            name = f"{source.removesuffix('.cu')} {name} of {world_size}, {grid} blocks"
            yield Use(name, load, threads, grid=grid)


def norm_launch(hidden_size: int) -> tuple[int, int]:
    """Threads, and the most blocks."""
    rows = max(rows for rows in range(1, norm.MAX_ROWS + 1) if norm.NormLayout(2).takes(rows, hidden_size))
    row_blocks = norm.choose_row_blocks(hidden_size)
    return norm.row_threads(hidden_size) // row_blocks, rows * row_blocks


def main() -> None:
    """A line for each use."""
    with pretended_card() as nvrtc:
        for use in every_use():
            taken = nvrtc.measure(use)
            print(
                f"{use.name:<52} {use.threads:>4} threads {taken.registers:>3} registers "
                f"{taken.static_bytes:>5} + {taken.dynamic_bytes:>5} bytes "
                f"{taken.resident(use.threads):>2} of {use.blocks} blocks  {problem(use, taken)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
