"""Reading ahead to a card: pinned buffers are not filled again before their copy is done, and are given back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from parallel.checkpoint import read_ahead
from parallel.checkpoint.headers import read_header
from parallel.checkpoint.read import TensorSlice
from parallel.checkpoint.read_ahead import ReadAhead

pytestmark = pytest.mark.gpu

MIB = 2**20
NUM_TENSORS = 24
SHAPE = (2048, 4096)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 tensors of 16 MiB, of any bits."""
    path = tmp_path_factory.mktemp("stored") / "some.safetensors"
    save_file(
        {f"t{index}": torch.randint(-(2**15), 2**15, SHAPE, dtype=torch.int16) for index in range(NUM_TENSORS)}, path
    )
    return path


def hold_card(num_products: int = 40) -> None:
    """Queues work, so that copies queued after it are far from done when the host goes on."""
    square = torch.randn(4096, 4096, device="cuda")
    for _ in range(num_products):
        square = square @ square
        square /= square.norm()


@pytest.mark.parametrize("limit_bytes", [2 * MIB, 8 * MIB, 64 * MIB, read_ahead.LIMIT_BYTES])
@pytest.mark.parametrize("slices", [(), (slice(None), slice(1000, 3000))], ids=["whole", "columns"])
def test_bytes_on_the_card_are_those_of_the_file(file: Path, slices: tuple[slice, ...], limit_bytes: int) -> None:
    card, host = torch.device("cuda"), torch.device("cpu")
    wanted = [TensorSlice(entry, slices) for entry in read_header(file).values()]
    taken = []
    with ReadAhead(wanted, card, limit_bytes) as reader:
        for each in wanted:
            hold_card()
            taken.append(reader.take(each))
    with ReadAhead(wanted, host, limit_bytes) as reader:
        for each, on_card in zip(wanted, taken, strict=True):
            assert torch.equal(reader.take(each), on_card.cpu()), each.entry.name


def test_on_another_stream_too(file: Path) -> None:
    """Events go to the stream that copies."""
    wanted = [TensorSlice(entry) for entry in read_header(file).values()]
    with torch.cuda.stream(torch.cuda.Stream()), ReadAhead(wanted, torch.device("cuda"), 8 * MIB) as reader:
        taken = []
        for each in wanted:
            hold_card()
            taken.append(reader.take(each))
        torch.cuda.current_stream().synchronize()
    with ReadAhead(wanted, torch.device("cpu")) as reader:
        assert all(torch.equal(reader.take(each), on_card.cpu()) for each, on_card in zip(wanted, taken, strict=True))


def pinned_bytes() -> int:
    return int(torch.cuda.host_memory_stats()["allocated_bytes.current"])


def test_pinned_memory_stays_within_the_limit_and_is_given_back(file: Path) -> None:
    before = pinned_bytes()
    wanted = [TensorSlice(entry) for entry in read_header(file).values()]
    with ReadAhead(wanted, torch.device("cuda"), 64 * MIB) as reader:
        for each in wanted:
            reader.take(each)
        assert 32 * MIB <= pinned_bytes() - before <= 64 * MIB
    # Less where other tests had left some.
    assert pinned_bytes() <= before
