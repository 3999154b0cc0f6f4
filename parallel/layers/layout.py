"""The weights of a layer side by side in one piece of memory, so that one copy moves them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Where a tensor may begin: what torch's allocator keeps to, and more than any kernel asks for.
ALIGNMENT = 512


@dataclass(frozen=True)
class Slot:
    """A parameter or buffer of a module, and where its bytes lie."""

    owner: nn.Module
    name: str
    is_parameter: bool
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def table(self) -> dict[str, Tensor | None]:
        """The module's own table that has it."""
        return self.owner._parameters if self.is_parameter else self.owner._buffers  # type: ignore[return-value]

    @property
    def tensor(self) -> Tensor:
        tensor = self.table[self.name]
        assert tensor is not None, f"{self.name} had a slot"
        return tensor

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        """Its place in `memory`, [bytes] uint8."""
        piece = memory[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)
        return nn.Parameter(piece, requires_grad=False) if self.is_parameter else piece


@dataclass(frozen=True)
class Layout:
    """All tensors of a layer, each at a multiple of ALIGNMENT; `num_bytes` in all."""

    slots: tuple[Slot, ...]
    num_bytes: int

    @classmethod
    def of(cls, layer: nn.Module) -> Layout:
        slots, end = [], 0
        for owner in layer.modules():
            for is_parameter, table in ((True, owner._parameters), (False, owner._buffers)):
                for name, tensor in table.items():
                    if tensor is not None:
                        slots.append(Slot(owner, name, is_parameter, end, tensor.shape, tensor.dtype))
                        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return cls(tuple(slots), end)

    def tensors(self) -> list[Tensor]:
        """What the layer holds now."""
        return [slot.tensor for slot in self.slots]

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors as they lie in `memory`, [num_bytes or more] uint8."""
        return [slot.view(memory) for slot in self.slots]

    def bind(self, tensors: Sequence[Tensor]) -> None:
        """Makes the layer hold `tensors`, in the order of the slots."""
        for slot, tensor in zip(self.slots, tensors, strict=True):
            slot.table[slot.name] = tensor

    def unbind(self) -> None:
        """Leaves the layer with shapes alone: its memory is free once nobody else holds it."""
        self.bind([on_meta(slot) for slot in self.slots])


def gather_layer(layer: nn.Module) -> None:
    """Moves all tensors of a layer into one piece of memory on their device."""
    layout = Layout.of(layer)
    memory = torch.empty(layout.num_bytes, dtype=torch.uint8, device=layout.slots[0].tensor.device)
    views = layout.views(memory)
    for view, tensor in zip(views, layout.tensors(), strict=True):
        view.copy_(tensor)
    layout.bind(views)


def on_meta(slot: Slot) -> Tensor:
    empty = torch.empty(slot.shape, dtype=slot.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if slot.is_parameter else empty
