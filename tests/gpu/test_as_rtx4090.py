"""The code of an RTX 4090 on the card that there is (as_rtx4090/sitecustomize.py): what the other tests say of kernels
holds for those of compute_89 too, and a whole run takes no others."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from parallel.kernels import launch
from tests.gpu.test_bench import FACTS, WORKLOAD
from tests.launcher.cli import environment, run

pytestmark = pytest.mark.gpu

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
TARGET = ".target sm_89"
# Every kernel and every launch that is chosen, without those that could be; the engine.
SELECTED = (
    "test_engine.py",
    "test_packed_kernels.py::test_few_rows_and_many_multiply_by_the_weight_that_was_given",
    "test_packed_kernels.py::test_every_byte_of_float8_is_decoded_exactly",
    "test_packed_kernels.py::test_merged_linears_give_the_same_outputs_in_one_launch",
    "test_packed_kernels.py::test_the_kernel_is_captured_in_a_graph",
    "test_wide.py::test_every_launch_that_is_chosen_agrees_with_float64_whatever_the_rows",
    "test_wide.py::test_a_graph_gives_the_same_sums_at_each_replay_beside_other_shapes",
    "test_swiglu.py::test_merged_gate_and_up_are_activated_by_one_launch_in_graphs_too",
    "test_paged_attention.py::test_agrees_with_float64",
    "test_paged_attention.py::test_rows_of_a_tree_agree_with_float64",
    "test_paged_attention.py::test_a_graph_of_a_tree_follows_lengths_and_masks",
    "test_paged_attention.py::test_a_captured_graph_follows_lengths_and_pages",
    "test_fused.py",
    "test_sharing.py::test_the_card_multiplies_by_what_is_packed_for_the_host",
    "test_host_memory.py::test_every_length_is_summed",
    "test_dense.py::test_every_length_is_summed",
    "test_dense.py::test_rounded_numbers_are_summed_as_plain_torch_does",
    "test_two_step.py::test_large_messages_are_summed_in_two_steps",
    "test_host_memory_norm.py::test_bits_are_those_of_two_steps",
    "test_copies.py::test_sums_are_right_of_all_sizes_and_after_thousands_of_calls",
)
OF_SM90 = "wide_wgmma.cu"


def as_rtx4090(kernels: Path) -> dict[str, str]:
    """Variables for processes that are to run so; `kernels`: where they note what they load."""
    paths = (str(FOLDER / "as_rtx4090"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": os.pathsep.join(paths), "AS_RTX4090_KERNELS": str(kernels)}


def sources_of(kernels: Path) -> set[str]:
    """The files of our kernels that were loaded, with tools' each for compute_89."""
    folders = (ROOT / "parallel" / "kernels", ROOT / "parallel" / "transports")
    paths = [path for folder in folders for path in folder.glob("*.cu")]
    files = {hashlib.sha256(launch.read_source(path).encode()).hexdigest(): path.name for path in paths}
    loaded = [line.rsplit(maxsplit=2) for line in kernels.read_text(encoding="utf-8").splitlines()]
    assert {target for target, *_ in loaded} == {TARGET}
    return {files[source] for *_, source in loaded if source in files}


def program(*command: str, kernels: Path) -> str:
    result = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(as_rtx4090(kernels)),
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    return result.stdout


def test_such_a_process_sees_another_card(tmp_path: Path) -> None:
    code = (
        "import torch; from parallel.kernels import wide, warp_groups, multiprocessors, w4a16; "
        "layout = w4a16.find_layout(128, 16, torch.bfloat16, has_codebook=False); "
        "print(multiprocessors.describe_card(0), wide.launches_for(layout, 64, 0) is wide.LAUNCHES, "
        "torch.cuda.get_device_properties(0).total_memory)"
    )
    found = program("-c", code, kernels=tmp_path / "kernels")
    memory = torch.cuda.get_device_properties(0).total_memory
    assert found.splitlines()[-1] == f"Card(multiprocessors=128, shared_bytes=102400) True {memory}"


@pytest.mark.timeout(600)
def test_all_kernels_pass_their_tests(tmp_path: Path) -> None:
    selected: Sequence[str] = [str(FOLDER / each) for each in SELECTED]
    said = program("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--durations=12", *selected,
                   kernels=tmp_path / "kernels")  # fmt: skip
    print(said[-2000:])
    assert " passed" in said and " skipped" not in said
    sources = (ROOT / "parallel").glob("*/*.cu")
    assert sources_of(tmp_path / "kernels") == {path.name for path in sources} - {OF_SM90}


@pytest.mark.parametrize("quantize", ("int4", "fp8"))
def test_a_run_takes_no_others(tmp_path: Path, quantize: str) -> None:
    arguments = (*FACTS, *WORKLOAD, "gpus=1", f"model.quantize={quantize}", "engine.kv_dtype=fp8")
    result = run(*arguments, folder=tmp_path / "run", env=as_rtx4090(tmp_path / "kernels"))
    assert result.returncode == 0, result.stderr
    assert result.report["breakdown"]["parts"]["attention"]["us"] > 0
    found = sources_of(tmp_path / "kernels")
    linear = "w4a16.cu" if quantize == "int4" else "w8a16.cu"
    assert {linear, "wide.cu", "paged_attention.cu", "fused_norm.cu", "fused_rotary.cu"} <= found
    assert OF_SM90 not in found
