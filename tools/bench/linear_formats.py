"""The formats that our own linear kernels multiply by: random weights of each, packed, run and checked on a card."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from parallel.footprint import UNIT_INPUTS, WIDE_WORKSPACE_BYTES
from parallel.kernels import w4a16, w8a16, warp_groups, wide
from parallel.kernels.packed_layout import Layout
from parallel.kernels.tiles import OUTPUTS_PER_TILE, Launch, choose_launch
from parallel.kernels.warp_groups import GroupLaunch
from parallel.quantized import QuantizedWeight

# The table of "QLoRA: Efficient Finetuning of Quantized LLMs" (Dettmers et al., 2023), appendix E.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
AnyLaunch = Launch | wide.AnyLaunch
# NaN in e4m3, with its sign: no checkpoint that loads has one.
E4M3_NAN = (0x7F, 0xFF)


@dataclass(frozen=True)
class Packed:
    """Buffers of a packed linear."""

    packed: Tensor
    scales: Tensor
    codebook: Tensor | None = None


@dataclass(frozen=True)
class OwnFormat:
    """`group_size` inputs share a scale; None: all of an output. `kind`: int, e4m3 or codebook.

    `dtype`: of scales as they come; 4-bit integers keep those of 16 bits, all else makes them float32.
    """

    bits: int
    group_size: int | None
    kind: str = "int"
    dtype: torch.dtype = torch.float32
    has_zeros: bool = False

    def num_groups(self, num_in: int) -> int:
        return num_in // (self.group_size or num_in)

    def held_bits(self, num_in: int) -> float:
        return self.bits + self.scale_bits / (self.group_size or num_in)

    @property
    def scale_bits(self) -> int:
        """Held for a scale and its zero."""
        return 20 if self.has_short_scales and self.has_zeros else 16 if self.has_short_scales else 32

    @property
    def has_short_scales(self) -> bool:
        return self.bits == 4 and self.kind == "int" and self.dtype in w4a16.SHORT

    def random_weight(self, num_out: int, num_in: int) -> QuantizedWeight:
        """Fresh values, scales and zeros."""
        groups = self.num_groups(num_in)
        values = torch.randint(0, 2**self.bits, (num_out, num_in), dtype=torch.uint8, device="cuda")
        if self.kind == "e4m3":
            for nan in E4M3_NAN:
                values[values == nan] = nan - 1
            values = values.view(torch.float8_e4m3fn)
        zeros = torch.randint(0, 2**self.bits, (num_out, groups), dtype=torch.uint8, device="cuda")
        return QuantizedWeight(
            values,
            self.bits,
            (torch.rand(num_out, groups, device="cuda") * 0.01 + 0.001).to(self.dtype),
            zeros if self.has_zeros else None,
            self.group_size or num_in,
            codebook=torch.tensor(NF4, device="cuda") if self.kind == "codebook" else None,
        )

    def random_packed(self, num_out: int, num_in: int) -> Packed:
        """Any bits are a valid weight."""
        tiles, units = num_out // OUTPUTS_PER_TILE, num_in // 128
        shape = (tiles, units, self.bits // 2, 32, 4)
        return Packed(
            torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda"),
            torch.rand(tiles, self.num_groups(num_in), self.width, device="cuda").to(self.held_dtype),
            w4a16.pack_codebook(torch.tensor(NF4, device="cuda")) if self.kind == "codebook" else None,
        )

    @property
    def held_dtype(self) -> torch.dtype:
        return self.dtype if self.has_short_scales else torch.float32

    @property
    def width(self) -> int:
        """Numbers of `held_dtype` for the scales and zeros of a group of 16 outputs."""
        return self.scale_bits * OUTPUTS_PER_TILE // 8 // self.held_dtype.itemsize

    def layer(self, weight: QuantizedWeight) -> nn.Module:
        return w4a16.W4A16Linear(weight) if self.bits == 4 else w8a16.W8A16Linear(weight)

    def pack(self, weight: QuantizedWeight) -> Packed:
        layer = self.layer(weight)
        return Packed(layer.packed, layer.scales, getattr(layer, "codebook", None))

    def run(
        self,
        launch: AnyLaunch,
        rows: Tensor,
        weight: Packed,
        output: Tensor,
        workspace: Tensor | None = None,
        *,
        swiglu: bool = False,
    ) -> None:
        """`workspace`: as of wide.run_kernel."""
        layout = self.wide_layout(swiglu=swiglu)
        if isinstance(launch, wide.AnyLaunch):
            wide.run_kernel(
                launch, rows, weight.packed, weight.scales, weight.codebook, output, layout, workspace=workspace
            )
        elif self.bits == 4:
            w4a16.run_kernel(launch, rows, weight.packed, weight.scales, weight.codebook, output, swiglu=swiglu)
        else:
            w8a16.run_kernel(launch, rows, weight.packed, weight.scales, output, layout)

    def dequantize(self, weight: Packed) -> Tensor:
        if self.bits == 4:
            return w4a16.dequantize_w4(weight.packed, weight.scales, weight.codebook)
        return w8a16.dequantize_w8(weight.packed, weight.scales, self.kind == "e4m3")

    def unpack(self, weight: Packed) -> Tensor:
        """[out, in] float32, by plain torch."""
        if self.bits == 4:
            return w4a16.unpack_weight(weight.packed, weight.scales, weight.codebook)
        return w8a16.unpack_weight(weight.packed, weight.scales, is_float=self.kind == "e4m3")

    def choose(self, num_rows: int, shape: tuple[int, int], *, swiglu: bool = False) -> AnyLaunch:
        """For a weight of these outputs and inputs."""
        if self.bits == 4:
            launches = w4a16.launches_for(has_codebook=self.kind == "codebook", swiglu=swiglu)
        else:
            launches = w8a16.launches_for(swiglu=swiglu)
        if num_rows > max(launches):
            layout, units = self.wide_layout(swiglu=swiglu), shape[1] // UNIT_INPUTS
            return wide.choose_launch(num_rows, wide.launches_for(layout, units, torch.cuda.current_device()))
        return choose_launch(launches, num_rows, shape[0] // OUTPUTS_PER_TILE)

    def wide_layout(self, *, swiglu: bool = False) -> Layout:
        if self.bits == 8:
            is_float = self.kind == "e4m3"
            return w8a16.wide_layout(is_grouped=self.group_size is not None, is_float=is_float, swiglu=swiglu)
        has_codebook = self.kind == "codebook"
        return w4a16.find_layout(
            self.group_size or 128, self.width, self.held_dtype, has_codebook=has_codebook, swiglu=swiglu
        )

    def compile(self, launch: AnyLaunch, *, swiglu: bool = False) -> None:
        """Ahead of its use, in whatever thread."""
        device_index, layout = torch.cuda.current_device(), self.wide_layout(swiglu=swiglu)
        if isinstance(launch, wide.Launch):
            wide.compile_kernel(launch, layout, device_index)
        elif isinstance(launch, GroupLaunch):
            warp_groups.compile_kernel(launch, layout, device_index)
        elif self.bits == 4:
            w4a16.multiply_kernel(launch, layout, device_index)
        else:
            w8a16.multiply_kernel(launch, layout, device_index)


FORMATS = {
    "w4": OwnFormat(4, 128, dtype=torch.bfloat16),
    "w4-zeros": OwnFormat(4, 128, dtype=torch.float16, has_zeros=True),
    "w4-float": OwnFormat(4, 128, has_zeros=True),
    "w4-g64": OwnFormat(4, 64, dtype=torch.float16),
    "w4-g32": OwnFormat(4, 32, dtype=torch.bfloat16, has_zeros=True),
    "nf4": OwnFormat(4, 64, "codebook"),
    "int8": OwnFormat(8, None),
    "int8-g128": OwnFormat(8, 128, has_zeros=True),
    "fp8": OwnFormat(8, None, "e4m3"),
    "fp8-block": OwnFormat(8, 128, "e4m3"),
}


def compile_in_threads(every: Iterable[tuple[OwnFormat, AnyLaunch, bool]]) -> None:
    """Each once: a format, a launch, and whether it is the kernel with the activation."""

    def compile_one(own: OwnFormat, launch: AnyLaunch, swiglu: bool) -> None:
        # Makes the card's context current in this thread, which the driver asks for.
        torch.zeros((), device="cuda")
        own.compile(launch, swiglu=swiglu)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda each: compile_one(*each), set(every)))


def rounds_weights(own: OwnFormat, launch: AnyLaunch) -> bool:
    """Whether the kernel multiplies by weights that are rounded to bf16, as wide_wgmma.cu says."""
    return isinstance(launch, GroupLaunch) and own.wide_layout().scale_bytes > 0


@dataclass(frozen=True)
class Expected:
    """Products in float64 [m, out]: with the weight, and with the weight rounded to bf16 as it is dequantised."""

    exact: Tensor
    rounded: Tensor

    @classmethod
    def of(cls, own: OwnFormat, rows: Tensor, weight: QuantizedWeight, packed: Packed) -> Expected:
        exact = rounded_codebook(weight).dequantize(torch.float64)
        return cls(*(rows.double() @ each.t() for each in (exact, own.dequantize(packed).double())))


def rounded_codebook(weight: QuantizedWeight) -> QuantizedWeight:
    """What the kernel is to compute with: the entries of a codebook in bf16."""
    if weight.codebook is None:
        return weight
    return replace(weight, codebook=weight.codebook.bfloat16().float())


def check_launch(name: str, launch: AnyLaunch, rows: Tensor, packed: Packed, expected: Expected) -> None:
    outputs = []
    for _ in range(2):
        output = torch.full(expected.exact.shape, float("nan"), device="cuda", dtype=torch.bfloat16)
        workspace = torch.full((WIDE_WORKSPACE_BYTES // 4,), float("nan"), device="cuda")
        FORMATS[name].run(launch, rows, packed, output, workspace)
        outputs.append(output)
    assert torch.equal(*outputs), f"{name} {launch} {tuple(output.shape)}: two launches differ"
    assert_close(outputs[0], expected, f"{name} {launch}", rounded=rounds_weights(FORMATS[name], launch))


def assert_close(output: Tensor, expected: Expected, what: str, *, rounded: bool) -> None:
    # Sums in float32, the lost bits of scales, and weights right between two numbers of bf16 that are rounded to the
    # other one, are small beside the outputs' usual size. The last are the same ones all over a group, so that a few
    # outputs are far off; by their mean square outputs are as if rounded once.
    product, lost = (expected.rounded, 3e-2) if rounded else (expected.exact, 2e-3)
    error, usual = (output.double() - product).abs(), product.abs().mean()
    spread = (error.square().mean().sqrt() / usual).item()
    assert spread <= 2.5e-3, f"{what} {tuple(output.shape)}: off by {spread} of the usual output"
    excess = (error / (product.abs() * 2**-8 + usual * lost)).max().item()
    assert excess <= 1, f"{what} {tuple(output.shape)}: {excess} of what is allowed"
