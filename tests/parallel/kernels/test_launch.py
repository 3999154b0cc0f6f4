"""What of starting kernels shows without a card: parameters in memory, sources, and compiled kernels on disk."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel.kernels import binaries, launch
from tools.bench.chain import starting_early


def test_parameters_lie_as_in_a_struct_of_c() -> None:
    class Members(ctypes.Structure):
        _fields_ = (("a", ctypes.c_int), ("b", ctypes.c_void_p), ("c", ctypes.c_float), ("d", ctypes.c_longlong))

    assert launch.offsets("iPfq") == [getattr(Members, name).offset for name in "abcd"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("line 3: no such thing.\nand more"), "line 3: no such thing"),
        (MemoryError(), "MemoryError()"),
    ],
)
def test_kernel_that_cannot_be_had_is_left_out_whatever_the_error_says(error: Exception, reason: str) -> None:
    def load(*arguments: object) -> None:
        raise error

    assert launch.load_problem(load) == f"it cannot be compiled: {reason}"


class Attribute(ctypes.Structure):
    """cuda.h: CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class Config(ctypes.Structure):
    """cuda.h: CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


TYPES = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_float, ctypes.c_longlong)


class Driver:
    """Keeps what it was called with: kernel, grid, block, shared bytes and stream, attributes, parameters."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        pointer, count = ctypes.c_void_p, ctypes.c_uint
        plain = ctypes.CFUNCTYPE(ctypes.c_int, pointer, *[count] * 7, pointer, pointer, pointer)
        extended = ctypes.CFUNCTYPE(ctypes.c_int, *[pointer] * 4)
        entries = {"cuLaunchKernel": plain(self.launch), "cuLaunchKernelEx": extended(self.launch_extended)}
        monkeypatch.setattr(launch, "open_driver", lambda: SimpleNamespace(**entries))
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 1000 + index, raising=False)

    def launch(self, *arguments: Any) -> int:
        self.calls.append((*arguments[:9], *values_at(arguments[9])))
        return 0

    def launch_extended(self, config: int, function: int, parameters: int, extra: int | None) -> int:
        found = Config.from_address(config)
        attributes = [(found.attributes[i].id, found.attributes[i].value) for i in range(found.num_attributes)]
        sizes = (*found.grid, *found.block, found.shared_bytes)
        self.calls.append((function, *sizes, found.stream, attributes, *values_at(parameters)))
        return 0


def values_at(parameters: int) -> list[Any]:
    places = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
    return [ctypes.cast(places[i], ctypes.POINTER(kind))[0] for i, kind in enumerate(TYPES)]


def test_the_driver_gets_every_parameter_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    kernel = launch.Kernel(77, "PiPfq", 3, shared_bytes=640)
    tensor = torch.zeros(2)
    kernel((4, 5, 6), 128, tensor, -3, None, 0.5, 2**40)
    kernel((1, 1, 1), 32, None, 9, tensor, 0.25, -1)
    assert driver.calls == [
        (77, 4, 5, 6, 128, 1, 1, 640, 1003, tensor.data_ptr(), -3, None, 0.5, 2**40),
        (77, 1, 1, 1, 32, 1, 1, 640, 1003, None, 9, tensor.data_ptr(), 0.25, -1),
    ]


def test_kernels_that_wait_by_themselves_start_early_in_graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, is_capturing = Driver(monkeypatch), True
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: is_capturing, raising=False)
    waiting, plain = (launch.Kernel(78, "PiPfq", 3, shared_bytes=640, waits=waits) for waits in (True, False))
    for kernel in (waiting, plain):
        kernel((4, 5, 6), 128, None, -3, None, 0.5, 2**40)
    is_capturing = False
    waiting((1, 1, 1), 32, None, 9, None, 0.25, -1)
    is_capturing = True
    # As those that compare both ways ask for.
    with starting_early(False):
        waiting((1, 1, 1), 32, None, 9, None, 0.25, -1)
    # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION is 6.
    assert driver.calls == [
        (78, 4, 5, 6, 128, 1, 1, 640, 1003, [(6, 1)], None, -3, None, 0.5, 2**40),
        (78, 4, 5, 6, 128, 1, 1, 640, 1003, None, -3, None, 0.5, 2**40),
        *[(78, 1, 1, 1, 32, 1, 1, 640, 1003, None, 9, None, 0.25, -1)] * 2,
    ]


@pytest.mark.parametrize(("capability", "expected"), [((8, 9), False), ((9, 0), True), ((12, 0), True)])
def test_only_cards_from_sm_90_on_start_kernels_early(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: tuple[int, int], expected: bool
) -> None:
    Driver(monkeypatch)
    loaded = SimpleNamespace(func=ctypes.c_void_p(5), set_shared_memory_config=lambda num_bytes: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(launch, "read_or_compile", lambda *arguments: b"")
    monkeypatch.setattr(launch.cuda_utils, "_cuda_load_module", lambda binary, names: {"k": loaded})
    texts = {"waits.cu": "{ wait_for_predecessors(); }", "defines.cu": "void wait_for_predecessors() {}"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        kernel = launch.load_kernel(tmp_path / name, "k", (), "P", 0)
        assert kernel.waits == (expected and name == "waits.cu")


def test_sources_hold_what_they_include() -> None:
    folder = Path(launch.__file__).parent
    sources = [*folder.glob("*.cu"), *(folder.parent / "transports").glob("*.cu")]
    assert {"w4a16.cu", "host_memory.cu"} <= {path.name for path in sources}
    for path in sources:
        assert "#include" not in launch.read_source(path)
    assert "u32 to_pair(" in launch.read_source(folder / "fused_silu.cu")


def test_a_kernel_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "kernel.cubin"
    made: list[int] = []

    def make() -> bytes:
        made.append(1)
        return b"code" * 1000

    assert binaries.read_or_make(path, make) == binaries.read_or_make(path, make) == b"code" * 1000
    assert len(made) == 1 and [file.name for file in path.parent.iterdir()] == ["kernel.cubin"]


@pytest.mark.parametrize("damage", [lambda old: b"", lambda old: old[:-1], lambda old: old[:-1] + b"x"])
def test_what_is_damaged_on_disk_is_made_again(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "kernel.cubin"
    binaries.write_whole(path, b"code")
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert binaries.read_or_make(path, lambda: b"new") == b"new"
    assert binaries.read_whole(path) == b"new"


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert binaries.read_or_make(tmp_path / "file" / "kernel.cubin", lambda: b"code") == b"code"


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    assert binaries.read_or_make(tmp_path / "kernel.cubin", lambda: b"code") == b"code"
    assert not list(tmp_path.iterdir())


def test_the_place_of_the_cache_and_what_tells_kernels_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(binaries, "nvrtc_version", lambda: "13.0")
    monkeypatch.setattr(binaries, "compile_binary", lambda *parts: repr(parts).encode())
    kinds = [("s", "k", ("-DA=1",), "89"), ("t", "k", ("-DA=1",), "89"), ("s", "l", ("-DA=1",), "89")]
    kinds += [("s", "k", ("-DA=2",), "89"), ("s", "k", ("-DA=1",), "90")]
    for _ in range(2):
        assert [binaries.read_or_compile(*kind) for kind in kinds] == [repr(kind).encode() for kind in kinds]
    assert len(list((tmp_path / "launch70b" / "kernels").iterdir())) == len(kinds)
