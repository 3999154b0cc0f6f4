"""Models of which some layers are read from the checkpoint in every pass answer as those in memory."""

from __future__ import annotations

import ctypes
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from parallel.checkpoint.headers import read_checkpoint
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.checkpoint.read import TensorSlice
from parallel.communicator import Communicator
from parallel.engine.speculation.speculator import Speculation
from parallel.formats.scheme import CheckpointError
from parallel.offload import disk_reads
from parallel.offload.disk_reads import DiskReads, Stamps
from tests.parallel.engine.prefill.test_overlap import Cut, cut_passes
from tests.parallel.offload.streamed import answers, demo_runs, disk_of, poisoned
from tests.parallel.quantized_models import NEXT, PROMPTS, write_pair
from tests.parallel.ranks import CPU, forced_logits, make_engine, numbered, run_on_ranks
from tests.parallel.small_models import COMMON, DEMO, prompts_of, write_model

FORCED = [[5, 6, 7], [8, 9, 10], [11, 12, 13], [14, 15, 16]]
M_MMAP_THRESHOLD = -3
# Of the five layers of the demo model, those in host memory and those on the disk.
SETS = (((), (2,)), ((1, 3), (0,)), ((0, 3), (1, 4)), ((), (0, 1, 2, 3, 4)))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("speculation", [None, Speculation("ngram", num_drafts=3)], ids=["plain", "ngram"])
def test_layers_on_the_disk_answer_as_resident_ones(world_size: int, speculation: Speculation | None) -> None:
    for resident, *others in run_on_ranks(demo_runs, world_size, speculation, SETS):
        assert len(set(map(tuple, resident))) == len(resident)
        assert others == [resident] * len(SETS)


def logits_of(
    communicator: Communicator, folder: Path, prompts: list[list[int]], forced: list[list[int]], quantize: str = ""
) -> Tensor:
    """Of the resident model, and of the one with both layers on the disk."""
    settings = {"quantize": QUANTIZE_SCHEMES.get(quantize)}
    resident = make_engine(communicator, folder, **settings)
    on_disk = poisoned(make_engine(communicator, folder, on_disk=(0, 1), **settings))
    return torch.stack([forced_logits(engine, prompts, forced) for engine in (resident, on_disk)])


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", ["awq", "gptq act order", "w4a16 act order", "nf4 nested", "fp8 by block"])
def test_quantised_layers_are_packed_anew(name: str, world_size: int, tmp_path: Path) -> None:
    folder = write_pair(name, tmp_path) / "quantized"
    for resident, on_disk in run_on_ranks(logits_of, world_size, folder, PROMPTS, [[token] for token in NEXT]):
        assert torch.isfinite(resident).all()
        assert torch.equal(resident, on_disk)


@pytest.mark.parametrize("quantize", ["int4", "fp8"])
def test_layers_are_rounded_anew(quantize: str, folders: dict[str, Path]) -> None:
    for resident, on_disk in run_on_ranks(logits_of, 2, folders["qwen3"], prompts_of("qwen3"), FORCED, quantize):
        assert torch.equal(resident, on_disk)


@pytest.mark.parametrize("name", ["llama_with_biases", "qwen3", "llama_tied"])
def test_biases_and_norms_are_read_too(name: str, folders: dict[str, Path]) -> None:
    resident, on_disk = run_on_ranks(logits_of, 1, folders[name], prompts_of(name), FORCED)[0]
    assert torch.equal(resident, on_disk)


def cut_states(communicator: Communicator, folder: Path, cut: Cut) -> tuple[Tensor, Tensor]:
    cut_passes(cut)
    engines = make_engine(communicator, folder), poisoned(make_engine(communicator, folder, on_disk=range(4)))
    resident, on_disk = (forced_logits(engine, prompts_of("llama"), FORCED) for engine in engines)
    return resident, on_disk


@pytest.mark.parametrize(
    "cut", [Cut(3), Cut(3, joined=(1, 2)), Cut(2, dequantizes=True)], ids=["sections", "joined", "halves"]
)
def test_passes_that_are_cut_add_the_biases_of_layers_that_are_gone(tmp_path: Path, cut: Cut) -> None:
    sizes = COMMON | {"num_hidden_layers": 4}
    folder = write_model(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True, tie_word_embeddings=False), tmp_path)
    for resident, on_disk in run_on_ranks(cut_states, 2, folder, cut):
        assert torch.equal(resident, on_disk)


def shares(communicator: Communicator, folder: Path) -> tuple[int, int]:
    """Bytes that this rank wants of the layers in a pass; and of their norms, which all ranks have."""
    disk = disk_of(make_engine(communicator, folder, on_disk=(0, 1)))
    norms = [read for source in disk.sources for step in source.begin()[1] for name, read in step.reads.items()
             if "norm" in name]  # fmt: skip
    return disk.bytes_per_pass, sum(read.num_bytes for read in norms)


def test_ranks_read_their_slices_alone(folders: dict[str, Path]) -> None:
    layers = [
        entry.num_bytes for name, entry in read_checkpoint(folders["qwen3"]).tensors.items() if ".layers." in name
    ]
    (first, norms), (second, _) = run_on_ranks(shares, 2, folders["qwen3"])
    assert first + second == sum(layers) + norms
    assert min(first, second) > sum(layers) / 3


def interrupted(communicator: Communicator) -> list[list[list[int]]]:
    """Answers before and after a pass that ended in the middle, at a layer and between two."""
    engine, prompts = make_engine(communicator, DEMO, streamed=(0,), on_disk=(1, 3)), numbered(prompts_of("demo"))
    found = [answers(engine, prompts)]
    for num_layers in (2, 3):
        assert engine.streamer is not None
        passing = engine.streamer.through(engine.model.model.layers, 1)
        for _ in range(num_layers):
            next(passing)
        passing.close()
        found.append(answers(engine, prompts))
    return found


def test_a_pass_that_fails_leaves_the_next_one_whole() -> None:
    before, *after = run_on_ranks(interrupted, 1)[0]
    assert after == [before, before]


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def replace_file(file: Path) -> None:
    """By one of the same size, as a download does that is made anew."""
    shutil.copy(file, file.with_suffix(".new"))
    file.with_suffix(".new").rename(file)


def overwrite(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x01")


HARM: dict[str, tuple[Callable[[Path], None], str]] = {
    "vanished": (Path.unlink, "model.safetensors cannot be read: No such file or directory."),
    "shrunk": (truncate, "model.safetensors was changed or replaced after it was loaded: it had "),
    "replaced": (replace_file, "model.safetensors was changed or replaced after it was loaded, and model.layers."),
    "overwritten": (overwrite, "model.safetensors was changed or replaced after it was loaded, and model.layers."),
}


def harmed(communicator: Communicator, folder: Path, name: str) -> str:
    engine, prompts = make_engine(communicator, folder, on_disk=(1,)), numbered(prompts_of("llama"))
    answers(engine, prompts)
    HARM[name][0](folder / "model.safetensors")
    try:
        answers(engine, prompts)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", HARM)
def test_files_that_change_meanwhile_are_told(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    assert HARM[name][1] in run_on_ranks(harmed, 1, folder, name)[0]


def anonymous_growth(communicator: Communicator, folder: Path, on_disk: range) -> tuple[int, int]:
    """The most anonymous memory that answers took above what there was before the model, sampled; and of a layer."""
    # Memory that is let go goes back to the system, where malloc would keep it.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    process, samples, done = psutil.Process(), [0], threading.Event()

    def anonymous() -> int:
        memory = process.memory_info()
        return int(memory.rss - memory.shared)

    def sample() -> None:
        while not done.wait(0.001):
            samples.append(anonymous() - before)

    before = anonymous()
    engine = make_engine(communicator, folder, on_disk=on_disk)
    thread = threading.Thread(target=sample)
    thread.start()
    answers(engine, numbered([[5, 6, 7]]), 3)
    samples.append(anonymous() - before)
    done.set()
    thread.join()
    return max(samples), disk_of(engine).packed_bytes // len(on_disk)


def test_host_memory_does_not_grow_with_the_layers_on_the_disk(tmp_path: Path) -> None:
    sizes = COMMON | {"hidden_size": 512, "intermediate_size": 3584, "num_hidden_layers": 14}
    folder = write_model(LlamaConfig(**sizes, tie_word_embeddings=False), tmp_path)
    (few, layer_bytes), (many, _) = (run_on_ranks(anonymous_growth, 1, folder, range(num))[0] for num in (7, 14))
    assert layer_bytes > 24e6
    # Seven layers fewer in memory, and none instead.
    assert many < few - 5 * layer_bytes
    assert many < 5 * layer_bytes, "the ring, a layer, and parts of it before they are merged"


def stored_layers(folder: Path, num_layers: int) -> tuple[dict[str, Tensor], list[list[TensorSlice]]]:
    """Random tensors, of some of which rows or columns are wanted."""
    shapes = {"a": (40, 3000), "b": (7,), "c": (300, 64), "d": (1,)}
    tensors = {f"{i}.{name}": torch.randn(shape) for i in range(num_layers) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    # The clock of files may stand still for 10 ms: what changes this one soon must change its time, too.
    os.utime(folder / "model.safetensors", (0, 0))
    entries = read_checkpoint(folder).tensors
    cuts = {"a": (slice(3, 31),), "b": (), "c": (slice(None), slice(11, 50)), "d": ()}
    return tensors, [
        [TensorSlice(entries[f"{i}.{name}"], cut) for name, cut in cuts.items()] for i in range(num_layers)
    ]


def check_layer(reads: DiskReads, layer: list[TensorSlice], tensors: dict[str, Tensor]) -> None:
    for wanted in layer:
        assert torch.equal(reads.take(wanted), tensors[wanted.entry.name][wanted.slices])


def test_reads_go_round_and_begin_again_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_reads, "CHUNK_BYTES", 4096)
    tensors, layers = stored_layers(tmp_path, 3)
    reads = DiskReads(layers, CPU, Stamps([tmp_path / "model.safetensors"]))
    reads.ring.memory.fill_(0xFF)
    reads.start(1)
    for place in (1, 2, 0, 1, 2):
        check_layer(reads, layers[place], tensors)
    reads.take(layers[0][0])
    for start in (2, 0, 0):
        reads.start(start)
        check_layer(reads, layers[start], tensors)
        check_layer(reads, layers[(start + 1) % 3], tensors)


def test_what_drives_gave_of_the_reads_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of which a part is wanted are read whole, and what the load had read before does not count."""
    given = disk_reads.drive_bytes()
    assert given is not None and given >= 0
    tensors, layers = stored_layers(tmp_path, 3)
    reads = DiskReads(layers, CPU, Stamps([tmp_path / "model.safetensors"]))
    assert reads.drive_share is None
    monkeypatch.setattr(disk_reads, "drive_bytes", lambda: 10**9)
    reads.start(0)
    assert reads.drive_share == 0
    check_layer(reads, layers[0], tensors)
    # Each asked for a second time, by the time that the first is used.
    num_bytes = 4 * (28 * 3000 + 7 + 300 * 64 + 1)
    monkeypatch.setattr(disk_reads, "drive_bytes", lambda: 10**9 + num_bytes)
    assert reads.drive_share == pytest.approx(num_bytes / reads.num_read)
    assert reads.num_read >= 2 * num_bytes
    monkeypatch.setattr(disk_reads, "drive_bytes", lambda: None)
    assert reads.drive_share is None


def test_the_next_layer_is_read_while_one_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more than that."""
    monkeypatch.setattr(disk_reads, "CHUNK_BYTES", 4096)
    tensors, layers = stored_layers(tmp_path, 4)
    reads = DiskReads(layers, CPU, Stamps([tmp_path / "model.safetensors"]))
    assert reads.layer_bytes[0] <= reads.ring_bytes < reads.layer_bytes[0] + 4 * 12000
    reads.start(0)
    check_layer(reads, layers[0], tensors)
    for _, _, future in reads.reading:
        future.result(timeout=60)
    assert [chunk for chunk, _, _ in reads.reading] == reads.layers[1]
    # What was read is used, whatever the file has become.
    overwrite(tmp_path / "model.safetensors")
    assert torch.equal(reads.take(layers[1][0]), tensors["1.a"][3:31])
    with pytest.raises(CheckpointError, match="changed or replaced"):
        for wanted in [*layers[1][1:], *layers[2]]:
            reads.take(wanted)
