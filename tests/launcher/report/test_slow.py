"""What is warned of after a run: transports that failed, and links that do less than they could."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.rank.context import describe_range
from launcher.report.slow import slow_parts
from parallel.transports.choice import Proof, Range

GOOD = {
    "index": 1,
    "pcie_generation": 4,
    "pcie_lanes": 16,
    "pcie_tx_peak_bytes_per_sec": 5 * 10**9,
    "pcie_rx_peak_bytes_per_sec": None,
    "pcie_replays": 0,
}
UNKNOWN = {**dict.fromkeys(GOOD), "index": 1}


CHOSEN = Range("nccl", None, "4.3 us for 16384 bytes, where nccl takes 24.7 us", {})


def report(card: dict[str, Any], chosen: Range = CHOSEN) -> dict[str, Any]:
    return {
        "device": "cuda",
        "kernels": None,
        "load": None,
        "transport": {"all_sizes": describe_range(chosen)},
        "cards": [card],
        "inventory": {"cards": [{"index": 0, "pcie_generation": 5, "pcie_lanes": 32}, {**GOOD}]},
    }


@pytest.mark.parametrize("card", [GOOD, UNKNOWN, GOOD | {"index": 7, "pcie_lanes": 4}])
def test_nothing_is_said_of_a_link_that_is_well_or_unknown(card: dict[str, Any]) -> None:
    assert slow_parts(report(card)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pcie_lanes": 8}, "card 1 has 8 of 16 PCIe lanes: "),
        ({"pcie_generation": 3}, "card 1 ran its link at PCIe 3 under load, where card and slot can do 4: "),
        ({"pcie_replays": 12}, "card 1 sent 12 packets again: "),
    ],
)
def test_a_poor_link_is_told(change: dict[str, int], words: str) -> None:
    (line,) = slow_parts(report(GOOD | change))
    assert line.startswith(words)
    assert slow_parts(report(GOOD | change) | {"device": "cpu"}) == []


def answered(num_prompts: int, batch_size: int, **changes: Any) -> dict[str, Any]:
    """A report's part about prompts of up to 500 tokens, with answers of up to 100; room is for 8192 and a little."""
    found = {
        "outputs": [{"num_prompt_tokens": 500 - place % 2} for place in range(num_prompts)],
        "batch_size": batch_size,
        "max_context": 8192,
        "predicted": {"offload": None, "kv_tokens_that_fit": 8400},
        "config": {"engine": {"max_context": None}, "workload": {"output_tokens": 100}},
    }
    return found | changes


@pytest.mark.parametrize(
    ("num_prompts", "batch_size", "words"),
    [
        (1, 1, []),
        (2, 1, ["2 prompts were answered 1 at a time: workload.batch_size=2 shares each pass among 2."]),
        (100, 4, ["100 prompts were answered 4 at a time: workload.batch_size=8 shares each pass among 8."]),
        (7, 4, []),
        (100, 8, []),
    ],
)
def test_prompts_that_wait_for_one_another_are_told(num_prompts: int, batch_size: int, words: list[str]) -> None:
    assert slow_parts(report(GOOD) | answered(num_prompts, batch_size)) == words


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({"predicted": {"offload": None, "kv_tokens_that_fit": 2000}}, 3),
        ({"predicted": {"offload": None, "kv_tokens_that_fit": 700}}, None),
        ({"predicted": {"offload": {}, "kv_tokens_that_fit": 700}}, 8),
        ({"config": {"engine": {"max_context": 4096}, "workload": {"output_tokens": 100}}}, 2),
        ({"config": {"engine": {"max_context": None}, "workload": {"output_tokens": 5000}}}, None),
        ({"config": {"engine": {"max_context": None}, "workload": {"output_tokens": 5000}}, "max_context": 1024}, 8),
    ],
    ids=["some fit", "one fits", "streamed", "context asked for", "long answers", "a model of few positions"],
)
def test_no_more_prompts_are_advised_than_there_is_room_for(changes: dict[str, Any], more: int | None) -> None:
    """With more at a time the context would be shorter than the prompts, which would be refused."""
    lines = slow_parts(report(GOOD) | answered(100, 1, **changes))
    assert [line.partition("workload.batch_size=")[2].split()[0] for line in lines] == ([str(more)] if more else [])


def test_an_idle_link_is_slow_on_purpose() -> None:
    assert slow_parts(report(GOOD | {"pcie_generation": 1, "pcie_tx_peak_bytes_per_sec": 10**8})) == []


def test_transports_that_failed_are_told_with_what_helps_and_slower_ones_are_not() -> None:
    """Whatever words their errors have."""
    refused = Proof("host_memory", error="rank 0: cuMemHostRegister_v2 failed with CUDA_ERROR_OUT_OF_MEMORY")
    wrong = Proof("host_memory_dense", error="rank 1: gave wrong sums; of 4 bytes of float32")
    slower = "host_memory_norm was left out: rank 0 took 7.5 us, where a kernel each takes 7.3 us"
    chosen = Range("nccl", None, slower, {}).noting_failures([refused, Proof("host_memory_copies"), wrong])
    first, second = slow_parts(report(GOOD, chosen))
    assert first.startswith("host_memory was left out: rank 0: cuMemHostRegister_v2 failed") and "memlock=-1" in first
    assert second == "host_memory_dense was left out: rank 1: gave wrong sums; of 4 bytes of float32"
