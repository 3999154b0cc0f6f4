"""A layer's tensors in one piece of memory."""

from __future__ import annotations

import torch
from torch import nn

from parallel.layers.layout import ALIGNMENT, gather_layer


class Layer(nn.Module):
    """Parameters and buffers of several types, one of them empty and one absent."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(33, 7).bfloat16().requires_grad_(False)
        self.norm = nn.RMSNorm(33).requires_grad_(False)
        self.register_buffer("packed", torch.randint(-(2**31), 2**31 - 1, (5, 3), dtype=torch.int32))
        self.register_buffer("scales", torch.rand(11).half())
        self.register_buffer("none", None)
        self.register_buffer("empty", torch.empty(0, 4))


def test_values_types_and_parameters_stay_and_memory_is_one() -> None:
    layer = Layer()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    parameters = {name for name, _ in layer.named_parameters()}
    gather_layer(layer)
    after = layer.state_dict()
    assert {name for name, _ in layer.named_parameters()} == parameters
    assert set(after) == set(before)
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert len({tensor.untyped_storage().data_ptr() for tensor in after.values() if tensor.numel()}) == 1


def test_every_tensor_begins_where_kernels_may_read_it() -> None:
    layer = Layer()
    gather_layer(layer)
    starts = [tensor.storage_offset() * tensor.element_size() for tensor in layer.state_dict().values()]
    assert all(start % ALIGNMENT == 0 for start in starts)
