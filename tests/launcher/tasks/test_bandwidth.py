"""What a decode step must read, and how near its time comes to that of reading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from launcher.plan.offload import OffloadPlan
from launcher.plan.offload_disk import MEASURED, DiskRate
from launcher.tasks.bandwidth import bandwidth, step_bytes, streamed_floors
from parallel.communicator import Communicator
from tests.parallel.ranks import make_engine, run_on_ranks
from tests.parallel.small_models import CONFIGS, write_model

GB = 10**9


def measured(communicator: Communicator, folder: Path) -> dict[str, Any]:
    engine = make_engine(communicator, folder)
    shares = [bandwidth(engine, [10, 7], 2.0, 1e9, streamed_ms) for streamed_ms in ((), (1.0, 50.0), (50.0, None))]
    return {"bytes": step_bytes(engine, [10, 7]), "share": shares[0], "streamed": shares[1:]}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_all_weights_are_read_but_an_embedding_that_is_no_head(tmp_path: Path, name: str) -> None:
    """Counted in the file: one rank, in float32."""
    folder = write_model(CONFIGS[name], tmp_path / name)
    with safe_open(folder / "model.safetensors", "pt") as file:
        sizes = {key: 4 * file.get_tensor(key).numel() for key in file.keys()}  # noqa: SIM118
    if not CONFIGS[name].tie_word_embeddings:
        del sizes["model.embed_tokens.weight"]
    config = CONFIGS[name]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    (found,) = run_on_ranks(measured, 1, folder)
    assert found["bytes"] == {"weights": sum(sizes.values()), "kv": 17 * per_token}
    # At a gigabyte a second, against 2 ms.
    floor_ms = (sum(sizes.values()) + 17 * per_token) / 1e6
    assert found["share"]["bandwidth_share"] == pytest.approx(floor_ms / 2)
    assert found["share"]["bandwidth"]["floor_ms"] == pytest.approx(floor_ms)
    assert [each["bandwidth_share"] for each in found["streamed"]] == [25.0, None]


def planned(disk_rate: DiskRate | None) -> OffloadPlan:
    """Of two ranks, which read 40 GB of the disk in a pass."""
    disk = {} if disk_rate is None else {"disk_layers": (1,), "disk_bytes": (19 * GB, 21 * GB), "disk_rate": disk_rate}
    return OffloadPlan((0,), 0, "", (0, 0), (10 * GB, 10 * GB), (25.0, 25.0), **disk)


def streamed(drive_share: float | None, *, has_disk: bool = True, rate: float | None = 20.0) -> dict[str, Any]:
    """10 GB of host memory and 19 of the disk, over a link of 20 GB/s."""
    disk = {"bytes_per_pass": 19 * GB, "drive_share": drive_share} if has_disk else None
    floor_ms = 10 / rate * 1e3 if rate else None
    return {"bytes_per_pass": 10 * GB, "copy_gb_per_sec": rate, "floor_ms": floor_ms, "disk": disk}


def test_a_step_is_held_against_the_link_and_the_drive_at_its_measured_rate() -> None:
    """All ranks share the drive; what it gives goes over the link, too."""
    measured_rate = DiskRate(5.0, MEASURED)
    assert streamed_floors(streamed(1.0), planned(measured_rate)) == [29 / 20 * 1e3, 8000.0]
    assert streamed_floors(streamed(0.5), planned(measured_rate)) == [29 / 20 * 1e3, 4000.0]
    assert streamed_floors(streamed(None, has_disk=False), planned(None)) == [500.0]
    assert streamed_floors(None, None) == []


@pytest.mark.parametrize(
    ("drive_share", "rate"),
    [(1.0, DiskRate(5.0, "assumed")), (0.0, DiskRate(5.0, MEASURED)), (None, DiskRate(5.0, MEASURED))],
    ids=["assumed", "nothing from a drive", "the kernel does not tell"],
)
def test_a_disk_of_unknown_rate_leaves_no_floor(drive_share: float | None, rate: DiskRate) -> None:
    assert streamed_floors(streamed(drive_share), planned(rate)) == [29 / 20 * 1e3, None]
    assert streamed_floors(streamed(drive_share, rate=None), planned(rate)) == [None, None]
