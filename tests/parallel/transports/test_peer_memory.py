"""What goes through the cards' own memory, with torch's op replaced: which messages; how it is had, and freed."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.communicator import TransportError
from parallel.transports import peer_memory
from parallel.transports.peer_memory import MAX_BYTES, PeerMemory, reach_each_other, wrap_peer_memory
from parallel.transports.solo import Solo

CPU = torch.device("cpu")


class Counting(Solo):
    """Two ranks, of which the other has no problem; it counts what is left to it."""

    world_size = 2

    def __init__(self) -> None:
        super().__init__(CPU)
        self.reduced: list[int] = []

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.reduced.append(tensor.nbytes)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor, torch.zeros_like(tensor)])


def double(message: Tensor, operation: str, group: str, out: Tensor) -> Tensor:
    """Torch's op where two ranks have the same message, with what it asks of its tensors."""
    assert (operation, group) == ("sum", "0")
    assert message.is_contiguous() and out.is_contiguous() and message.shape == out.shape
    assert message.storage_offset() == 0 and out.data_ptr() % 16 == 0
    return out.copy_(message + message)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> PeerMemory:
    monkeypatch.setattr(torch.ops.symm_mem, "one_shot_all_reduce_out", double)
    return PeerMemory(Counting(), torch.empty(MAX_BYTES, dtype=torch.uint8), "0")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("num_bytes", (16, 48, 16384, MAX_BYTES))
def test_whole_units_are_summed_in_place(opened: PeerMemory, num_bytes: int, dtype: torch.dtype) -> None:
    tensor = torch.arange(num_bytes // dtype.itemsize).remainder(61).to(dtype).view(2, -1)
    expected = 2 * tensor
    assert opened.all_reduce(tensor) is tensor
    assert torch.equal(tensor, expected)
    assert not opened.inner.reduced  # type: ignore[attr-defined]


def test_views_come_back_where_they_lie(opened: PeerMemory) -> None:
    base = torch.ones(101)
    opened.all_reduce(base[1:])
    assert base[0] == 1 and (base[1:] == 2).all()
    square = torch.arange(64.0).view(8, 8)
    opened.all_reduce(square.T)
    assert torch.equal(square, 2 * torch.arange(64.0).view(8, 8))


def test_all_else_goes_on(opened: PeerMemory) -> None:
    for tensor in (
        torch.ones(0),
        torch.ones(5),
        torch.ones(MAX_BYTES // 4 + 4),
        torch.ones(16, dtype=torch.float16),
        torch.ones(16, dtype=torch.int32),
    ):
        assert opened.all_reduce(tensor) is tensor
        assert opened.inner.reduced.pop() == tensor.nbytes  # type: ignore[attr-defined]


def fake_torch(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    """Its module of symmetric memory, and a default group; `calls`: what was mapped."""
    empty = SimpleNamespace(empty_strided_p2p=lambda size, stride, dtype, device: torch.empty(size, dtype=dtype))
    module = SimpleNamespace(
        _SymmetricMemory=empty, rendezvous=lambda tensor, group: calls.append((tensor.nbytes, group))
    )
    monkeypatch.setattr(peer_memory, "symmetric_memory", lambda: module)
    groups = SimpleNamespace(WORLD=SimpleNamespace(group_name="0"))
    monkeypatch.setattr(peer_memory, "dist", SimpleNamespace(group=groups))
    monkeypatch.setenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", "0")


def test_the_buffer_is_mapped_once_without_multicast_and_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fake_torch(monkeypatch, calls)
    communicator = wrap_peer_memory(Counting(), CPU)
    assert calls == [(MAX_BYTES, "0")]
    assert peer_memory.os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
    assert communicator.buffer is not None
    buffer = weakref.ref(communicator.buffer)
    communicator.close()
    assert buffer() is None
    communicator.close()


def test_a_torch_without_it_is_an_error_on_all_ranks_before_any_waits_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    fake_torch(monkeypatch, calls)

    def missing() -> None:
        raise ModuleNotFoundError("No module named 'torch.distributed._symmetric_memory'")

    monkeypatch.setattr(peer_memory, "symmetric_memory", missing)
    with pytest.raises(TransportError, match=r"rank 0 No module named"):
        wrap_peer_memory(Counting(), CPU)
    assert not calls


@pytest.mark.parametrize(
    ("access", "atomics", "disabled", "reach"),
    [
        ((), (), "0", True),
        (((2, 0),), (), "0", False),
        ((), ((0, 1),), "0", False),
        ((), (), "1", False),
    ],
)
def test_cards_reach_each_other_where_all_pairs_do_and_nobody_forbids_it(
    monkeypatch: pytest.MonkeyPatch, access: Any, atomics: Any, disabled: str, reach: bool
) -> None:
    """`access`, `atomics`: pairs without."""
    monkeypatch.setenv("NCCL_P2P_DISABLE", disabled)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda card, peer: (card, peer) not in access)
    monkeypatch.setattr(peer_memory, "has_atomics", lambda card, peer: (card, peer) not in atomics)
    assert reach_each_other([0, 1, 2]) == reach


@pytest.mark.parametrize(("code", "value", "found"), [(0, 1, True), (0, 0, False), (101, 1, False)])
def test_the_driver_says_whether_a_link_has_atomics(
    monkeypatch: pytest.MonkeyPatch, code: int, value: int, found: bool
) -> None:
    def attribute(answer: Any, kind: int, card: int, peer: int) -> int:
        assert (kind, card, peer) == (3, 0, 1)
        answer._obj.value = value
        return code

    monkeypatch.setattr(peer_memory, "driver_function", {"cuDeviceGetP2PAttribute": attribute}.__getitem__)
    assert peer_memory.has_atomics(0, 1) == found


def test_this_torch_has_the_op_and_the_module() -> None:
    """The parts of torch that are used have no promise of staying; their signatures do not depend on the build."""
    schema = torch.ops.symm_mem.one_shot_all_reduce_out.default._schema
    assert [each.name for each in schema.arguments] == ["input", "reduce_op", "group_name", "out"]
    module = peer_memory.symmetric_memory()
    assert callable(module.rendezvous) and callable(module._SymmetricMemory.empty_strided_p2p)
