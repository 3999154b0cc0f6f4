"""Layers that the host computes for a card: rows there and back, both ways to multiply, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.communicator import Communicator
from parallel.kernels import host_int4
from parallel.kernels.host_int4 import HostInt4Linear
from parallel.offload.host_layers import HostLayers, SharedLayers
from parallel.offload.host_trial import HostTrial, Link
from parallel.quantized import QuantizedWeight
from parallel.shard import share_process_group
from tests.gpu.one_card import DEVICE, run_on_one_card
from tests.launcher.cli import run
from tests.parallel.offload.test_sharing import CONFIG, FORCED, PROMPTS, bound, open_engine, random_weight
from tests.parallel.ranks import forced_logits
from tests.parallel.small_models import write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(host_int4.layout_problem() is not None, reason="no known layout on this CPU"),
]


@pytest.mark.parametrize("zeros", [False, True])
def test_rows_of_the_card_come_back_multiplied_while_copies_go_on(zeros: bool) -> None:
    """Each time other rows, and other numbers of them: what came before would show."""
    weight, link = random_weight(1024, 512, zeros=zeros), Link(DEVICE)
    layer, exact_weight = HostInt4Linear(weight), weight.dequantize(torch.float64).t()
    for turn in range(60):
        link.keep_busy()
        rows = torch.randn(turn % 9 + 1, 512).bfloat16()
        found = layer(rows.to(DEVICE))
        assert found.device == DEVICE
        error = (found.cpu().double() - rows.double() @ exact_weight).abs()
        assert (error <= bound(rows, weight)).all(), f"turn {turn}"


def test_results_stay_when_the_next_product_comes_up() -> None:
    weight = random_weight(64, 128, zeros=False)
    layer = HostInt4Linear(weight)
    rows = [torch.randn(2, 128).bfloat16() for _ in range(50)]
    found = [layer(each.to(DEVICE)) for each in rows]
    for each, result in zip(rows, found, strict=True):
        assert torch.equal(result.cpu(), layer(each))


@pytest.mark.parametrize("num_rows", [1, 40, 300])
def test_the_card_multiplies_by_what_is_packed_for_the_host(num_rows: int) -> None:
    weight = random_weight(1088, 512, zeros=True)
    on_host = HostInt4Linear(weight)
    fields = (weight.values, weight.bits, weight.scales, weight.zeros, weight.group_size)
    on_card = HostInt4Linear(QuantizedWeight(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in fields)))
    assert torch.equal(on_card.packed.cpu(), on_host.packed)
    assert torch.equal(on_card.scales_and_shifts.cpu(), on_host.scales_and_shifts)
    # The kernel's numbers are those of plain torch.
    assert torch.equal(on_card.dequantize(slice(128, 1088)).cpu(), on_host.dequantize(slice(128, 1088)))
    rows = torch.randn(num_rows, 512).bfloat16()
    exact = rows.double() @ weight.dequantize(torch.float64).t()
    # Here each weight is rounded, too.
    most = bound(rows, weight) + 2**-8 * rows.double().abs() @ weight.dequantize(torch.float64).abs().t()
    assert ((on_card(rows.to(DEVICE)).cpu().double() - exact).abs() <= most).all()


def logits_of(communicator: Communicator, folder: Path) -> tuple[torch.Tensor, list[torch.Tensor]]:
    share_process_group(torch.device("cpu"))
    resident = forced_logits(open_engine(communicator, folder, None, DEVICE), PROMPTS, FORCED)
    shares = [SharedLayers((), 0), SharedLayers((1, 2), 0), SharedLayers((1, 2), 2), SharedLayers((0, 1, 2, 3), 8)]
    found = []
    for share in shares:
        engine = open_engine(communicator, folder, HostLayers(range(4), DEVICE, share), DEVICE)
        found += [forced_logits(engine, PROMPTS, FORCED).cpu() for _ in range(2)]
    return resident.cpu(), found


@pytest.mark.parametrize("world_size", [1, 2])
def test_shared_layers_answer_as_resident_ones(world_size: int, tmp_path: Path) -> None:
    folder = write_model(CONFIG, tmp_path / "model")
    for resident, found in run_on_one_card(logits_of, world_size, tmp_path, folder):
        spread = resident.double().std()
        for logits in found:
            assert ((logits - resident).double().pow(2).mean().sqrt() / spread) < 0.03
        for first, second in zip(found[::2], found[1::2], strict=True):
            assert torch.equal(first, second)


def test_a_trial_measures_what_can_be() -> None:
    rates = HostTrial(((8192, 8192), (28672, 8192)), DEVICE).measure(1, torch.get_num_threads())
    print(json.dumps(rates.report()))
    assert 0 < rates.link <= 1.1 * rates.link_alone
    assert rates.host > 0


FACTS = (
    *("task=bench", "workload.repeats=1", "workload.warm_up=1", "workload.prompt_tokens=512"),
    *("model=llama3_3_70b", "model.path=nobody/has-this", "model.shape.num_layers=20", "model.weights=dummy"),
    *("gpus=1", "model.quantize=int4", "workload.output_tokens=32", "engine.max_context=1024"),
)


def report_of(folder: Path, *args: str) -> dict[str, Any]:
    report = run(*FACTS, *args, folder=folder, env={"HF_HUB_OFFLINE": "1"}).report
    assert report.get("error") is None, report["error"]
    names = ("offload", "decode_step_ms", "ttft_ms", "tpot_ms")
    print(args, json.dumps({name: report[name] for name in names}))
    return report


def test_runs_with_layers_of_the_host(tmp_path: Path) -> None:
    """Twenty layers of a 70B, of which sixteen are in host memory: none, eight, and the best number on the host."""
    asked = {
        "none": ["offload.host_layers=0"],
        "eight": ["offload.host_layers=8"],
        "trial": ["offload.host_layers=null"],
    }
    found = {name: report_of(tmp_path / name, "offload.resident_layers=4", *args) for name, args in asked.items()}
    offloads = {name: report["offload"] for name, report in found.items()}
    assert offloads["none"]["host_layers"] == []
    assert offloads["none"]["bytes_per_pass"] == offloads["none"]["bytes_per_prompt_pass"]
    assert len(offloads["eight"]["host_layers"]) == 8
    assert offloads["eight"]["bytes_per_pass"] < 0.52 * offloads["eight"]["bytes_per_prompt_pass"]
    assert offloads["trial"]["trial"]["num_rows"] == 1
    for report in found.values():
        card, lines = report["cards"][0], report["predicted"]["cards"][0]["lines"]
        print(json.dumps({"lines": lines, "peak": card["peak_bytes"], "memory": card["memory"]}))
        # What torch holds: others may use the card beside.
        torch_bytes = sum(size for part, size in lines.items() if part not in ("context", "communicator", "graphs"))
        assert card["memory"]["allocated_peak_bytes"] <= 1.03 * torch_bytes
