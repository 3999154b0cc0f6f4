"""What a job asks of SLURM: figures worked out by hand from the plan's, and what is refused before it is submitted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.prompt_lengths import estimate_longest_prompt
from launcher.slurm import commands
from launcher.slurm.commands import requeue_if_out_of_time
from launcher.slurm.duration import minutes_of
from launcher.slurm.needs import find_needs, hardware_of
from launcher.slurm.request import Request, request_of
from launcher.timing.predict import Times
from tests.launcher.cli import environment
from tests.launcher.config.test_config import composed

PARAMS: dict[str, Any] = {"cards": "rtx4090", "timeout_min": None, "mem_gb": None, "cpus_per_task": None}
CHUNK = "engine.prefill_chunk_while_decoding"
SMALL = ("model=llama3_1_8b", "model.weights=dummy")


def times(tokens_per_sec: float) -> Times:
    return Times("a test", (), 0.0, {}, 0.0, "", tokens_per_sec, 0.0, 0.0, None)


# Time


def test_time_is_that_of_every_batch_twice_and_of_load_and_start() -> None:
    run = composed("task=bench", "workload.batch_size=4", "workload.num_requests=10", "workload.output_tokens=100")
    # 4 runs of 3 batches of 400 tokens at 10 a second: 480 s. 60 GB at 1 GB/s. The start, and the warning at the end.
    sec = 240 + 60 + 60 + 2 * 480
    found = minutes_of(run, times(10), 60 * 10**9)
    assert found.minutes == -(-sec // 300) * 5 == 25
    assert "480 s" in found.why and "60 s at 1 GB/s" in found.why and "a test" in found.why


def test_requests_that_come_slowly_take_as_long_as_they_come() -> None:
    run = composed("task=bench", "workload.num_requests=100", "workload.arrival_rate=0.1", "workload.warm_up=0")
    assert minutes_of(run, times(1e9), 0).minutes == (300 + 2 * 3 * 1000) // 300 * 5


def test_prompts_of_a_file_are_counted_and_the_longest_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a\n" + "b" * 3000 + "\n" + "c" * 30 + "\n")
    run = composed(f"prompts_file={file}", "workload.output_tokens=100")
    assert estimate_longest_prompt(run) == 1000
    assert minutes_of(run, times(1), 0).minutes == 15
    assert "3 requests of 100 tokens" in minutes_of(run, times(1), 0).why


def test_baselines_have_time_of_their_own() -> None:
    plain, beside = (
        minutes_of(composed("task=bench", f"bench.baselines=[{names}]"), times(1e9), 0).minutes
        for names in ("", "transformers,deepspeed")
    )
    assert beside == plain + 40


def test_time_is_that_of_the_chunks_that_the_run_will_choose() -> None:
    large = ("model=llama3_3_70b_awq", "model.weights=dummy", "task=bench", "gpus=2")
    work = ("workload.batch_size=8", "workload.prompt_tokens=1024", "engine.kv_dtype=fp8")
    chunks = ((), (f"{CHUNK}=256",), (f"{CHUNK}=512",))
    found = [find_needs(composed(*large, *work, *chunk)).why["time"] for chunk in chunks]
    assert found[0] == found[1] != found[2]


# Cards, cores and memory


def test_needs_without_cards_here_are_those_of_described_ones() -> None:
    found = find_needs(composed(*SMALL, "gpus=2", "task=bench", "hardware=local"), "rtx3090")
    assert (found.num_cards, found.num_cores, found.memory_gib) == (2, 8, 12)
    assert "RTX 3090" in found.why["cards"] and "RTX 3090" in found.why["time"]


def test_ranks_on_the_cpu_take_host_memory_and_no_card() -> None:
    found = find_needs(composed("gpus=2", "hardware=cpu"))
    assert (found.num_cards, found.memory_gib) == (0, 4)
    assert found.minutes == 60 and "there are no rates of CPUs" in found.why["time"]


def test_layers_that_are_streamed_take_host_memory() -> None:
    found = find_needs(composed("gpus=1", "model=llama3_3_70b", "model.quantize=int4", *SMALL[1:], "task=bench"))
    plain = find_needs(composed("gpus=1", *SMALL, "task=bench"))
    # 70B at about 4.25 bits and 2 GiB of embedding, less what one card of 24 GB holds.
    assert 12 < found.memory_gib - plain.memory_gib < 24
    assert "GiB of streamed layers" in found.why["memory"]


@pytest.mark.parametrize(("model", "gb"), [("llama3_3_70b model.quantize=int4", 141.1), ("llama3_3_70b_awq", 39.8)])
def test_time_of_the_load_is_that_of_the_whole_checkpoint(model: str, gb: float) -> None:
    """Also where less stays of it; 70.55 B weights, 68.45 of them in linears."""
    found = find_needs(composed("gpus=2", *f"model={model}".split(), "model.weights=dummy", "task=bench"))
    assert f"; {gb} GB of weights " in found.why["time"]


def test_keys_and_values_in_host_memory_are_counted() -> None:
    """Of all layers, 8 sequences of 4096 tokens and a page: 320 KiB a token, 10.02 GiB."""
    long = ("model=llama3_3_70b_awq", "model.weights=dummy", "gpus=1", "task=bench", "offload.resident_layers=0")
    long += ("workload.batch_size=8", "engine.max_context=4096")
    on_card, on_host = (find_needs(composed(*long, f"offload.kv={place}")) for place in ("card", "host"))
    assert 10 <= on_host.memory_gib - on_card.memory_gib <= 11
    assert "GiB of streamed layers, their keys and values" in on_host.why["memory"]


def test_probe_needs_no_model() -> None:
    assert find_needs(composed("task=probe", "gpus=4")).num_cards == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("gpus=2", "model=llama3_3_70b"), "do not fit"),
        (("gpus=2", "topology=triple"), "gpus=2"),
        (("task=plan",), "run it here"),
        (("prompts_file=/nowhere.txt",), "/nowhere.txt"),
    ],
)
def test_what_cannot_run_is_refused_at_once(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_needs(composed("model.weights=dummy", *overrides))


def test_unknown_cards_are_named_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"--cards gtx970: .*rtx3090, rtx4090"):
        hardware_of("gtx970")


# Requests of a sweep's jobs


def test_request_is_what_the_plan_needs_unless_the_launcher_says_otherwise() -> None:
    run = composed(*SMALL, "gpus=2", "task=bench")
    found = request_of(run, PARAMS)
    assert found == Request(2, 8, 12, find_needs(run).minutes)
    assert request_of(run, PARAMS | {"timeout_min": 7, "mem_gb": 1.5, "cpus_per_task": 3}) == Request(2, 3, 1.5, 7)


def test_job_that_is_refused_is_submitted_all_the_same_to_say_why() -> None:
    refused = composed("gpus=2", "model=llama3_3_70b", "model.weights=dummy")
    assert request_of(refused, PARAMS) == Request(2, 1, 4, 10)
    assert request_of(None, PARAMS).num_cards == 0


# Requeue


@pytest.mark.parametrize(
    ("state", "restarts", "expected"), [("RUNNING", "2", True), ("RUNNING", "3", False), ("COMPLETING", "0", False)]
)
def test_only_a_job_that_was_not_cancelled_goes_back_into_the_queue_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, state: str, restarts: str, expected: bool
) -> None:
    said: list[tuple[str, ...]] = []

    def run(*command: str) -> Any:
        said.append(command)
        return commands.subprocess.CompletedProcess(command, 0, f"12_3 {state}\n", "")

    monkeypatch.setattr(commands, "run", run)
    for name, value in {
        "SLURM_JOB_ID": "15",
        "SLURM_ARRAY_JOB_ID": "12",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_RESTART_COUNT": restarts,
    }.items():
        monkeypatch.setenv(name, value)
    assert requeue_if_out_of_time(3) is expected
    assert (("scontrol", "requeue", "15") in said) is expected


# Without submitit


def test_launcher_without_submitit_says_what_to_install(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['hydra_plugins.hydra_submitit_launcher'] = None; "
        "from launcher.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "-m", "hydra/launcher=slurm", "gpus=1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert "pip install 'launch70b[slurm]'" in error["message"], error
