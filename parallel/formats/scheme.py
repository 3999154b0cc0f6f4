"""How a quantised checkpoint stores a linear [out, in], and which part of each stored tensor a rank needs.

A format is a table of stored tensors, each dimension of which runs over outputs, inputs or groups, several to an
element where values are packed into words. Shapes and slices follow from the table alone. No torch here: a plan needs
this too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Slices = tuple[slice, ...]
Range = tuple[int, int]
# Dimensions that do not depend on the linear.
FIXED_LENGTHS = {"one": 1, "two": 2, "4 bits": 16, "8 bits": 256}
# A dimension of any length: bytes of JSON. Tools fill it up with spaces to so many.
TEXT, TEXT_BYTES = "text", 256
# Scales of bitsandbytes that share a scale of their own.
NESTED_GROUP = 256


class FormatError(ValueError):
    """A way of quantising that cannot be loaded; the message names the field, its value and what is supported."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file (and tensor) and the remedy."""


@dataclass(frozen=True)
class Scheme:
    """What config.json says about the quantised linears. `layout` is a key of `registry.FORMATS`.

    `group_size` inputs of an output share a scale; None where an output, or the whole tensor, has only one.
    `zeros_less_one`: the file has each zero less one (the first version of GPTQ's files).
    `act_order`: the groups' inputs are not neighbours, and each input's group is stored.
    `block_outputs` outputs share the scales of their groups.
    `has_codebook`: a value is the index of a number in a table that is stored.
    `nested_scales`: scales are quantised, too.
    """

    method: str
    layout: str
    bits: int
    group_size: int | None
    has_zeros: bool = False
    is_float: bool = False
    act_order: bool = False
    zeros_less_one: bool = False
    per_tensor: bool = False
    block_outputs: int = 1
    has_codebook: bool = False
    nested_scales: bool = False

    def num_groups(self, num_in: int) -> int:
        return 1 if self.group_size is None else math.ceil(num_in / self.group_size)


@dataclass(frozen=True)
class Part:
    """One stored tensor of a linear, named `LINEAR.name`.

    `axes` says for each dimension what it runs over (out, in, group; nested: groups of scales; a key of FIXED_LENGTHS;
    TEXT) and how many of them an element holds. No axes: a single number, whatever its rank. Dtypes are in
    safetensors' spelling.
    """

    name: str
    dtypes: tuple[str, ...]
    axes: tuple[tuple[str, int], ...]
    required: bool = True
    # Whether the values matter here; what does not is known, and left in the file.
    used: bool = True
    # Not 0: the file has all elements in one line, along the first of so many dimensions. Axes are those of a view.
    flat_dims: int = 0


@dataclass(frozen=True)
class Box:
    """The outputs and inputs of a linear that a rank holds: first, and last plus one."""

    outputs: Range
    inputs: Range

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs[1] - self.outputs[0], self.inputs[1] - self.inputs[0]


def viewed_shape(part: Part, scheme: Scheme, num_out: int, num_in: int) -> tuple[int, ...]:
    """The shape along the axes of `part` for a linear [num_out, num_in]."""
    num_groups = scheme.num_groups(num_in)
    nested = math.ceil(num_out * num_groups / NESTED_GROUP)
    sizes = FIXED_LENGTHS | {"out": num_out, "in": num_in, "group": num_groups, "nested": nested, TEXT: TEXT_BYTES}
    return tuple(math.ceil(sizes[axis] / each) for axis, each in part.axes)


def stored_shape(part: Part, scheme: Scheme, num_out: int, num_in: int) -> tuple[int, ...]:
    """The shape `part` has in the file for a linear [num_out, num_in]."""
    shape = viewed_shape(part, scheme, num_out, num_in)
    return (math.prod(shape), *[1] * (part.flat_dims - 1)) if part.flat_dims else shape


def is_expected(part: Part, shape: tuple[int, ...], scheme: Scheme, num_out: int, num_in: int) -> bool:
    if not part.axes:
        return math.prod(shape) == 1
    if part.axes == ((TEXT, 1),):
        return len(shape) == 1
    return shape == stored_shape(part, scheme, num_out, num_in)


def inputs_problem(scheme: Scheme, num_in: int) -> str:
    """Why linears of so many inputs cannot be read; empty: they can."""
    if scheme.has_codebook and scheme.group_size and num_in % scheme.group_size:
        return f"blocks of {scheme.group_size} weights run on from one row of {num_in} inputs to the next"
    return ""


def part_slices(part: Part, scheme: Scheme, num_in: int, box: Box) -> Slices:
    """The smallest part of the stored tensor that has all of `box`; words and groups that it cuts are read whole."""
    ranges = {"out": box.outputs, "in": box.inputs, "group": group_range(scheme, num_in, box)}
    return tuple(
        slice(ranges[axis][0] // each, math.ceil(ranges[axis][1] / each)) if axis in ranges else slice(None)
        for axis, each in part.axes
    )


def group_range(scheme: Scheme, num_in: int, box: Box) -> Range:
    """The groups that the inputs of `box` belong to. In act order they may belong to any."""
    if scheme.group_size is None:
        return 0, 1
    if scheme.act_order:
        return 0, scheme.num_groups(num_in)
    first, end = box.inputs
    # A rank without inputs has no groups, wherever it stands.
    return first // scheme.group_size, math.ceil(end / scheme.group_size) if end > first else first // scheme.group_size
