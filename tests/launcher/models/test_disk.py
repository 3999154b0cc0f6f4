"""Plans whose layers lie partly on the disk, the files they are read from, and runs through the command line."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from launcher.config import (
    HardwareConfig,
    LimitsConfig,
    ModelConfig,
    OffloadConfig,
    OffloadKind,
    TaskConfig,
    TaskKind,
    WeightsKind,
)
from launcher.memory.streamed import stored_layer_bytes
from launcher.models.disk_files import find_disk_folder, measure_disk
from launcher.models.shape import TYPICAL_SCHEMES, quantized_shape
from launcher.plan.offload import OffloadPlan
from launcher.plan.offload_disk import ASSUMED_GB_PER_SEC, HOST_BYTES_PER_RANK, OTHER_PACK_BYTES
from launcher.plan.plan import Plan, demand_of
from launcher.plan.topology import place_ranks
from launcher.report.plan_text import describe
from parallel.units import GIB, MIB
from tests.launcher.cli import SHORT
from tests.launcher.forked import run
from tests.launcher.plans import (
    CPU,
    LLAMA_70B,
    LLAMA_70B_AWQ,
    NO_TIMES,
    TINY,
    cards_of,
    plan,
    refused,
    run_of,
)
from tests.parallel.small_models import CONFIGS, DEMO, write_model

AWQ_4 = replace(LLAMA_70B_AWQ, linear_bits=4.25)
DISK = OffloadConfig(disk="checkpoint")
# A layer of Llama-70B.
LAYER_WEIGHTS = 8192 * (2 * (8192 + 1024) + 3 * 28672)
NORM_BYTES = 2 * 8192 * 2


def limited(gib: float) -> dict[str, LimitsConfig]:
    return {"limits": LimitsConfig(host_memory_gib=gib)}


def offload_of(decided: Plan) -> OffloadPlan:
    assert decided.offload is not None
    return decided.offload


def test_as_many_layers_as_host_memory_lacks_are_on_the_disk() -> None:
    whole, less = (offload_of(plan(AWQ_4, cards_of(1), offload=DISK, **limited(gib))) for gib in (32, 16))
    assert whole.disk_layers == ()
    assert offload_of(plan(AWQ_4, cards_of(1), **limited(32))) == whole
    layer = LAYER_WEIGHTS * 4.25 / 8 + NORM_BYTES
    assert less.disk_bytes[0] == pytest.approx(len(less.disk_layers) * layer, rel=1e-6)
    assert layer < less.ring_bytes[0] < 1.2 * layer
    assert less.pass_bytes[0] == pytest.approx(len(less.streamed_layers) * layer, rel=1e-6)
    needed = less.host_bytes[0] + less.ring_bytes[0] + HOST_BYTES_PER_RANK
    assert needed <= 16 * GIB < needed + layer
    indices = [*less.streamed_layers, *less.disk_layers]
    assert len(set(indices)) == len(indices) == 80 - less.resident_layers


def test_the_card_has_room_for_a_layer_that_is_made_there() -> None:
    decided = plan(AWQ_4, cards_of(1), offload=DISK, **limited(16))
    layer = LAYER_WEIGHTS * 4.25 / 8
    lines = decided.cards[0].lines
    # Gate and up are merged beside it, or the largest linear is decoded to a byte a weight.
    assert layer + 8192 * 28672 < lines["disk"] < 3 * layer
    assert decided.cards[0].predicted_bytes <= decided.cards[0].budget_bytes
    all_of_it = plan(AWQ_4, cards_of(1), offload=OffloadConfig(disk="checkpoint", disk_layers=80))
    assert "staging" not in all_of_it.cards[0].lines
    assert offload_of(all_of_it).streamed_layers == ()


@pytest.mark.parametrize(("num_on_disk", "resident", "peak_mib"), [(20, 43, 23074), (40, 40, 20940)])
def test_layers_from_the_disk_take_what_an_h200_took(num_on_disk: int, resident: int, peak_mib: int) -> None:
    """With room for prompts of 1024 tokens; those that it took had few."""
    shape = replace(LLAMA_70B_AWQ, scheme=TYPICAL_SCHEMES["awq"])
    card = cards_of(1, memory_bytes=140 * GIB, compute_capability=(9, 0))
    offload = OffloadConfig(disk="checkpoint", disk_layers=num_on_disk, resident_layers=resident, host_layers=0)
    predicted = plan(shape, card, offload=offload, engine__max_context=1024).cards[0].predicted_bytes / MIB
    assert peak_mib + 32 <= predicted <= 1.006 * peak_mib


@pytest.mark.parametrize("gib", [8, 16, 20])
@pytest.mark.parametrize("changes", [{}, {"resident_layers": 40}], ids=["chosen", "set"])
def test_a_refusal_names_the_disk_with_what_it_holds_once_that_is_followed(gib: int, changes: dict[str, int]) -> None:
    """What is made on the card takes room there, so that more layers leave it than would without."""
    message = refused(AWQ_4, cards_of(1), offload=OffloadConfig(**changes), **limited(gib))
    assert f"{gib}.00 of" in message
    disk = OffloadConfig(disk="checkpoint", **changes)
    least = len(offload_of(plan(AWQ_4, cards_of(1), offload=disk, **limited(gib))).disk_layers)
    assert f"or offload.disk=checkpoint, which reads {least} of 80 layers from the checkpoint's files" in message
    too_few = replace(disk, disk_layers=0)
    message = refused(AWQ_4, cards_of(1), offload=too_few, **limited(gib))
    assert f"or offload.disk_layers={least} or more; or" in message
    for num in (least, least + 3):
        followed = offload_of(plan(AWQ_4, cards_of(1), offload=replace(disk, disk_layers=num), **limited(gib)))
        assert len(followed.disk_layers) == min(num, 80 - followed.resident_layers)


def test_the_disk_is_no_remedy_where_there_is_none_or_the_card_lacks_room_for_a_layer_from_it() -> None:
    assert "offload.disk" not in refused(AWQ_4, cards_of(1), model=dummy(), **limited(16))
    message = refused(AWQ_4, cards_of(1), offload=OffloadConfig(resident_layers=46), **limited(16))
    assert "host memory, which does not suffice" in message and "offload.disk" not in message
    followed = refused(AWQ_4, cards_of(1), offload=OffloadConfig(resident_layers=46, disk="checkpoint"), **limited(16))
    assert "GiB of 23.60" in followed and "resident_layers=45" in followed


def test_even_the_embedding_may_be_too_much() -> None:
    message = refused(AWQ_4, cards_of(1), offload=DISK, **limited(6))
    assert message.startswith("host memory does not suffice, with every layer that is not on a card on the disk")
    assert "1.96 GiB for the embedding and 0.47 to read others ahead" in message
    assert "6.43 (predicted), and 6.00 of 64.00 may be used (limits.host_memory_gib)." in message


def test_free_host_memory_decides_of_a_run_and_all_of_it_of_a_plan() -> None:
    small = replace(cards_of(1), host_memory_bytes=32 * GIB, host_free_bytes=16 * GIB)
    assert offload_of(plan(AWQ_4, small, offload=DISK)).disk_layers == ()
    decided = plan(AWQ_4, small, offload=DISK, task=TaskConfig(TaskKind.generate))
    assert decided.offload == offload_of(plan(AWQ_4, cards_of(1), offload=DISK, **limited(16)))


def dummy() -> ModelConfig:
    return ModelConfig(path="m", weights=WeightsKind.dummy)


@pytest.mark.parametrize("batch_size", [1, 256])
def test_dummies_have_no_files_to_read(batch_size: int) -> None:
    """Which is told before sequences that do not fit, too."""
    workload = {"workload__prompt_tokens": 2000, "workload__batch_size": batch_size}
    message = refused(AWQ_4, cards_of(1), offload=DISK, model=dummy(), **limited(16), **workload)
    assert message.startswith("offload.disk=checkpoint reads ")
    assert "model.weights=dummy has none" in message


def test_a_pass_waits_for_the_slowest_of_link_disk_and_packing() -> None:
    all_of_it = OffloadConfig(disk="checkpoint", disk_layers=80)
    offload = offload_of(plan(AWQ_4, cards_of(1), offload=all_of_it))
    assert offload.disk_ms == pytest.approx(offload.disk_bytes[0] / ASSUMED_GB_PER_SEC / 1e6)
    assert offload.pack_ms == pytest.approx(len(offload.disk_layers) * LAYER_WEIGHTS * OTHER_PACK_BYTES / 1008e6)
    # A layer is packed once it has been copied.
    copies_ms = offload.disk_bytes[0] / 25e6
    assert offload.pass_ms == pytest.approx(copies_ms + (offload.pack_ms or 0))
    assert offload.pass_ms > (offload.disk_ms or 0)
    known = offload_of(plan(replace(AWQ_4, scheme=TYPICAL_SCHEMES["awq"]), cards_of(1), offload=all_of_it))
    assert 0 < (known.pack_ms or 0) < (known.disk_ms or 0) / 3
    slow = offload_of(plan(AWQ_4, replace(cards_of(1), disk_gb_per_sec=1.0), offload=all_of_it))
    assert slow.pass_ms == pytest.approx(slow.disk_bytes[0] / 1e6)
    plain = offload_of(plan(LLAMA_70B, cards_of(1), offload=all_of_it, hardware=HardwareConfig(disk_gb_per_sec=100)))
    assert plain.pack_ms == 0
    assert plain.pass_ms == pytest.approx(plain.disk_bytes[0] / 25e6)


def test_ranks_share_the_disk() -> None:
    on_two = OffloadConfig(OffloadKind.on, resident_layers=20, disk="checkpoint", disk_layers=50)
    offload = offload_of(plan(AWQ_4, cards_of(2), 2, offload=on_two))
    assert len(offload.disk_layers) == 50
    assert offload.disk_ms == pytest.approx(sum(offload.disk_bytes) / ASSUMED_GB_PER_SEC / 1e6)
    layer = LAYER_WEIGHTS * 4.25 / 8
    assert sum(offload.disk_bytes) == pytest.approx(50 * (layer + 2 * NORM_BYTES), rel=1e-3)


def test_what_is_rounded_here_is_read_as_it_is_stored() -> None:
    run_config = run_of()
    shape = quantized_shape(LLAMA_70B, "int4")
    demand = demand_of(run_config, place_ranks(run_config, 1, cards_of(1)), shape, None)
    assert stored_layer_bytes(demand)[0] == LAYER_WEIGHTS * 2 + NORM_BYTES


def test_the_plan_says_how_many_lie_where_and_how_the_rate_is_known() -> None:
    decided = plan(AWQ_4, replace(cards_of(1), disk_gb_per_sec=2.5), offload=DISK, **limited(16))
    offload, said = offload_of(decided), dict(describe(decided, AWQ_4, NO_TIMES))
    assert said["streamed layers, predicted"].startswith(f"{len(offload.streamed_layers)} of 80, ")
    text = said["layers from the disk, predicted"]
    assert text.startswith(f"{len(offload.disk_layers)}, {offload.disk_bytes[0] / 1e9:.3g} GB a pass")
    assert "ms at 2.5 GB/s (measured on its files)" in text
    needed = sum(offload.host_bytes) + sum(offload.ring_bytes) + HOST_BYTES_PER_RANK
    assert said["host memory, predicted"].startswith(f"{needed / GIB:.2f} GiB of 16.00 ")
    adapter = TypeAdapter(Plan)
    assert adapter.validate_json(adapter.dump_json(decided)) == decided


def test_layers_on_a_cpu_are_asked_for() -> None:
    offload = offload_of(plan(TINY, CPU, offload=OffloadConfig(resident_layers=0, disk="checkpoint", disk_layers=1)))
    assert (len(offload.streamed_layers), len(offload.disk_layers)) == (1, 1)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (OffloadConfig(disk_layers=-1, disk="x"), "offload.disk_layers=-1 must be 0 or above."),
        (OffloadConfig(disk_layers=2), "offload.disk_layers=2 needs offload.disk=checkpoint"),
        (OffloadConfig(OffloadKind.off, disk="x"), "offload.disk=x is for layers that are not on the card"),
        (OffloadConfig(disk=" "), "offload.disk is empty."),
    ],
)
def test_values_that_contradict_are_named(config: OffloadConfig, problem: str) -> None:
    assert any(problem in each for each in run_of(offload=config).problems())


def folder_of(value: str, folder: Path = DEMO) -> Path:
    return find_disk_folder(run_of(offload=OffloadConfig(disk=value)), folder)


def test_the_folder_is_the_models_or_holds_a_copy(tmp_path: Path) -> None:
    assert folder_of("checkpoint") == DEMO
    assert folder_of(str(DEMO)) == DEMO
    shutil.copy(DEMO / "model.safetensors", tmp_path)
    assert folder_of(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match=r"no folder with .*nothing is written"):
        folder_of(str(tmp_path / "new"))


def test_another_checkpoint_of_the_same_shape_is_told(tmp_path: Path) -> None:
    first, second = (write_model(CONFIGS["llama"], tmp_path / str(seed), seed=seed) for seed in (1, 2))
    with pytest.raises(ValueError, match=r"holds another checkpoint than .* they differ in \w+\."):
        folder_of(str(second), first)
    with pytest.raises(ValueError, match="holds another checkpoint than"):
        folder_of(str(DEMO), first)


def test_small_files_tell_no_rate_and_large_ones_do(tmp_path: Path) -> None:
    assert measure_disk(DEMO) is None
    (tmp_path / "large.safetensors").write_bytes(bytes(17 * 2**20))
    rate = measure_disk(tmp_path)
    assert rate is not None
    assert rate > 0


def report_of(folder: Path, *args: str) -> dict[str, Any]:
    result = run("hardware=cpu", *SHORT, *args, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.report


def test_run_from_a_copy_answers_as_resident(tmp_path: Path) -> None:
    copy = shutil.copytree(DEMO, tmp_path / "copy")
    resident = report_of(tmp_path / "a")
    args = ("gpus=2", "offload.resident_layers=1", f"offload.disk={copy}", "offload.disk_layers=3")
    report = report_of(tmp_path / "b", *args)
    assert report["outputs"][0]["token_ids"] == resident["outputs"][0]["token_ids"]
    offload, predicted = report["offload"], report["predicted"]["offload"]
    assert (offload["resident_layers"], offload["streamed_layers"]) == (1, list(predicted["streamed_layers"]))
    disk = offload["disk"]
    assert disk["layers"] == list(predicted["disk_layers"])
    assert disk["bytes_per_pass"] == predicted["disk_bytes"][0]
    assert disk["ring_bytes"] > 0
    assert disk["gb_per_sec"] == pytest.approx(disk["bytes_per_pass"] / offload["step_ms"] / 1e6)
    assert 0 <= disk["drive_share"] <= 1
