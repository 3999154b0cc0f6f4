"""Reading ahead: the bytes are those that safetensors gives, in bounded memory, and errors reach the caller."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from parallel.checkpoint import chunks, read_ahead
from parallel.checkpoint.chunks import Bytes, Chunk, plan_chunks, read_chunk
from parallel.checkpoint.headers import read_checkpoint, read_header
from parallel.checkpoint.load import load_checkpoint
from parallel.checkpoint.read import DTYPES, TensorSlice
from parallel.checkpoint.read_ahead import ReadAhead
from parallel.communicator import Communicator
from parallel.formats.scheme import CheckpointError
from tests.parallel.ranks import CPU, build, run_on_ranks
from tests.parallel.small_models import COMMON
from tools.bench.load import process_memory, sampled_memory

MIB = 2**20
SHAPES = {"matrix": (37, 24), "vector": (53,), "number": (), "cube": (5, 7, 3), "empty": (0, 4), "column": (64, 1)}


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bits that the type can have, drawn anew each time."""
    wide = torch.randint(-128, 128, (*shape, dtype.itemsize), dtype=torch.int8)
    return wide.bool().view(shape) if dtype == torch.bool else wide.view(dtype).view(shape)


def write(folder: Path) -> Path:
    """A file with every shape in every dtype."""
    pairs = itertools.product(SHAPES.items(), DTYPES.items())
    tensors = {f"{name}.{key}": random_bytes(shape, dtype) for (name, shape), (key, dtype) in pairs}
    save_file(tensors, folder / "some.safetensors")
    return folder / "some.safetensors"


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def cuts(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Ways to cut the first two dimensions: not, at random, to nothing, and to the ends."""

    def some(size: int) -> slice:
        return slice(*sorted(random.choices(range(size + 1), k=2)))

    yield ()
    for _ in range(4):
        yield tuple(some(size) for size in shape[:1])
        yield tuple(some(size) for size in shape[:2])
        yield tuple(slice(None) if index == 0 else some(size) for index, size in enumerate(shape[:2]))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("stored"))


@pytest.mark.parametrize("limit_bytes", [16, 50, 1000, 10**6])
def test_tensors_are_those_that_safetensors_reads(
    file: Path, limit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "BLOCK_BYTES", 100)
    stored, entries = load_file(file), read_header(file)
    wanted = [TensorSlice(entry, cut) for entry in entries.values() for cut in cuts(entry.shape)]
    with ReadAhead(wanted, CPU, limit_bytes) as reader:
        for each in wanted:
            taken, whole = reader.take(each), stored[each.entry.name]
            expected = whole[each.slices] if each.slices else whole
            assert (taken.dtype, taken.shape) == (expected.dtype, expected.shape) == (each.dtype, each.shape)
            assert bits(taken) == bits(expected), each
            assert taken.nbytes == each.num_bytes
            assert taken.untyped_storage().nbytes() == taken.nbytes


@pytest.mark.parametrize("slices", [(), (slice(3, 30),), (slice(None), slice(5, 17))])
def test_chunks_tile_the_slice_and_fit_their_size(file: Path, slices: tuple[slice, ...]) -> None:
    wanted = TensorSlice(read_header(file)["matrix.F32"], slices)
    for size in (48, 100, 1000, 10**6):
        planned = list(plan_chunks(wanted, size))
        assert sum(chunk.kept_bytes for chunk in planned) == wanted.num_bytes
        assert max(chunk.kept_bytes for chunk in planned) <= size
        assert len(planned) <= 2 * wanted.num_bytes // size + 1


def test_dtype_that_torch_has_not_is_named(file: Path) -> None:
    entry = next(iter(read_header(file).values()))
    odd = TensorSlice(type(entry)("x.weight", file, "F4", (2, 2), 0, 2))
    with pytest.raises(CheckpointError, match=r"x\.weight in .*some\.safetensors is F4, which cannot be read"):
        _ = odd.dtype


class Spy:
    """Counts buffers, and can hold reads back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.buffer_bytes = 0
        self.started = threading.Semaphore(0)
        self.go = threading.Event()
        self.go.set()
        monkeypatch.setattr(read_ahead, "new_bytes", self.new_bytes)
        monkeypatch.setattr(read_ahead, "read_chunk", self.read_chunk)

    def new_bytes(self, num_bytes: int) -> Bytes:
        self.buffer_bytes += num_bytes
        return np.full(num_bytes, 255, dtype=np.uint8)

    def read_chunk(self, chunk: Chunk, buffer: Bytes) -> None:
        self.started.release()
        assert self.go.wait(60)
        read_chunk(chunk, buffer)


def matrices(file: Path) -> list[TensorSlice]:
    return [TensorSlice(entry) for name, entry in read_header(file).items() if name.startswith("matrix")]


@pytest.mark.parametrize("limit_bytes", [2**9, 2**12, 2**14])
def test_buffers_stay_within_the_limit_and_are_used_again(
    file: Path, limit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, wanted = Spy(monkeypatch), matrices(file)
    with ReadAhead(wanted, CPU, limit_bytes) as reader:
        for each in wanted:
            reader.take(each)
    assert limit_bytes // 2 <= spy.buffer_bytes <= limit_bytes < sum(each.num_bytes for each in wanted)


def test_later_tensors_are_read_before_the_first_is_taken(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy, wanted = Spy(monkeypatch), matrices(file)
    with ReadAhead(wanted, CPU) as reader:
        for _ in wanted:
            assert spy.started.acquire(timeout=60)
        assert reader.wait_sec == 0


def test_seconds_of_waiting_are_counted(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy, wanted = Spy(monkeypatch), matrices(file)
    spy.go.clear()
    now = 50.0

    def look() -> float:
        """The caller looks before it waits for bytes and after that: they come, and it is 3 s later."""
        nonlocal now
        if spy.go.is_set():
            now += 3.0
        spy.go.set()
        return now

    monkeypatch.setattr(read_ahead, "time", SimpleNamespace(perf_counter=look))
    with ReadAhead(wanted, CPU) as reader:
        reader.take(wanted[0])
        assert reader.wait_sec == 3.0


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read_")]


def test_file_that_became_shorter_is_named_with_the_tensor_and_threads_end(tmp_path: Path) -> None:
    file = write(tmp_path)
    wanted = matrices(file)
    last = wanted[-1].entry
    with file.open("r+b") as stream:
        stream.truncate(last.offset + 5)
    message = rf"some\.safetensors is truncated: it ends within {last.name}, at byte {last.offset + 5}\. Download"
    with pytest.raises(CheckpointError, match=message), ReadAhead(wanted, CPU, 2000) as reader:
        for each in wanted:
            reader.take(each)
    assert readers() == []


def on_a_card(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Copies are under way until they are waited for, as on a card."""

    def empty(*shape: Any, device: Any = None, pin_memory: bool = False, **options: Any) -> Tensor:
        return torch.empty(*shape, **options)

    stream = SimpleNamespace(synchronize=lambda: None)
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    card = SimpleNamespace(Event=lambda: event, current_stream=lambda device: stream)
    caches = SimpleNamespace(_host_emptyCache=lambda: None)
    monkeypatch.setattr(read_ahead, "torch", SimpleNamespace(empty=empty, uint8=torch.uint8, cuda=card, _C=caches))
    return torch.device("cuda", 0)


def test_error_comes_through_where_copies_to_a_card_are_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buffer that is free again by then is for no more reads."""
    file = write(tmp_path)
    wanted = matrices(file)
    cut = next(each for each in wanted if each.num_bytes > 2048)
    with file.open("r+b") as stream:
        stream.truncate(cut.entry.offset + 1500)
    message = rf"some\.safetensors is truncated: it ends within {cut.entry.name}"
    reader = ReadAhead(wanted, on_a_card(monkeypatch), 2048)
    with pytest.raises(CheckpointError, match=message), reader:
        for each in wanted:
            reader.take(each)
    assert readers() == []


def test_file_that_cannot_be_read_is_named_with_the_tensor(tmp_path: Path) -> None:
    file = write(tmp_path)
    wanted = matrices(file)
    file.unlink()
    message = rf"{wanted[0].entry.name} in .*some\.safetensors cannot be read: No such file or directory\."
    with pytest.raises(CheckpointError, match=message), ReadAhead(wanted, CPU, 2000) as reader:
        reader.take(wanted[0])


def test_threads_end_where_the_caller_fails(file: Path) -> None:
    with pytest.raises(KeyError), ReadAhead(matrices(file), CPU, 500):
        assert readers() != []
        raise KeyError
    assert readers() == []


def write_large_model(folder: Path) -> Path:
    """300 MB in bf16: a row of each tensor again and again."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 8000}
    config = LlamaConfig(**COMMON | sizes, tie_word_embeddings=False, dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    rows = {name: torch.randn(shape[-1:], dtype=torch.bfloat16) for name, shape in shapes.items()}
    config.save_pretrained(folder)
    tensors = {name: row.expand(shapes[name]).contiguous() for name, row in rows.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def load_and_watch(communicator: Communicator, folder: Path, limit_bytes: int) -> tuple[int, int]:
    """Bytes read, and the most that the process had in memory of its own above what it had before."""
    model, checkpoint = build(communicator, folder, torch.bfloat16), read_checkpoint(folder)
    before = process_memory()["RssAnon"]
    with sampled_memory() as peak:
        result = load_checkpoint(model, checkpoint, CPU, read_ahead_bytes=limit_bytes)
    return result.bytes_read, peak["RssAnon"] - before


def test_memory_is_the_model_and_the_buffers(tmp_path: Path) -> None:
    """A checkpoint of 300 MB through 32 MiB of buffers; beside them each thread has a small block."""
    write_large_model(tmp_path / "large")
    ((bytes_read, peak_bytes),) = run_on_ranks(load_and_watch, 1, tmp_path / "large", 32 * MIB)
    assert bytes_read > 300e6
    # The model at the least, which is there when all are sampled once more.
    assert 0.99 * bytes_read < peak_bytes < bytes_read + (32 + 16) * MIB
