"""topology=all: every way to run a model, what fits ranked by an aim."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.config import Aim, DType, OffloadKind, SpeculationConfig, SpeculationKind
from launcher.models.shape import TYPICAL_SCHEMES
from launcher.plan.options import Option, rank_options
from launcher.plan.plan import plan_run
from launcher.plan.topology import place_ranks
from launcher.report.options_text import options_table
from parallel.units import GIB
from tests.launcher.demo_model import DEMO
from tests.launcher.forked import run
from tests.launcher.plans import LLAMA_8B, LLAMA_70B_AWQ, cards_of, run_of

ARGUMENTS = ("task=plan", "topology=all", "hardware=rtx4090", "gpus=4", "model=llama3_3_70b_awq")
PROMPT = "workload.prompt_tokens=512"


def options(folder: Path, *more: str) -> list[dict[str, Any]]:
    result = run(*ARGUMENTS, *more, folder=folder)
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = result.report["options"]
    return found


@pytest.fixture(scope="module")
def by_latency(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return options(tmp_path_factory.mktemp("options"), PROMPT)


def test_every_number_of_cards_and_format_is_there_once(by_latency: list[dict[str, Any]]) -> None:
    found = [(each["world_size"], each["replicas"], each["format"]) for each in by_latency]
    copies = {1: 4, 2: 2, 3: 1, 4: 1}
    assert sorted(found) == sorted((n, copies[n], f) for n in copies for f in ("awq", "bf16", "int4", "int8", "fp8"))


def test_what_fits_comes_first_by_the_time_of_a_token(by_latency: list[dict[str, Any]]) -> None:
    fitting = [each for each in by_latency if each["fits"]]
    assert by_latency[: len(fitting)] == fitting
    times = [each["tpot_ms"] for each in fitting]
    assert times == sorted(times) and fitting[0]["world_size"] == 4


def test_what_does_not_fit_says_by_how_much(by_latency: list[dict[str, Any]]) -> None:
    alone = next(each for each in by_latency if each["world_size"] == 1 and each["format"] == "bf16")
    assert alone["reason"].startswith("the weights in bfloat16 do not fit: 13") and alone["reason"].endswith("of 23.60")
    assert alone["tpot_ms"] is None


def test_copies_add_up_for_throughput_and_context(tmp_path: Path, by_latency: list[dict[str, Any]]) -> None:
    def pairs(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {each["format"]: each for each in found if each["world_size"] == 2 and each["fits"]}

    one_pair, two_pairs = pairs(options(tmp_path, PROMPT, "gpus=2")), pairs(by_latency)
    assert one_pair and set(one_pair) == set(two_pairs)
    for name, pair in one_pair.items():
        assert two_pairs[name]["tokens_per_sec"] == pytest.approx(2 * pair["tokens_per_sec"])
        assert two_pairs[name]["kv_tokens"] == 2 * pair["kv_tokens"]


def test_another_aim_is_another_order(tmp_path: Path) -> None:
    result = run(*ARGUMENTS, PROMPT, "plan.aim=context", "workload.batch_size=2", folder=tmp_path)
    assert "2 at a time in each copy, predicted; the best for context first" in " ".join(result.stderr.split())
    fitting = [each for each in result.report["options"] if each["fits"]]
    tokens = [each["kv_tokens"] for each in fitting]
    assert tokens == sorted(tokens, reverse=True)


def test_times_stand_beside_their_floor_and_say_what_they_rest_on(tmp_path: Path) -> None:
    result = run(*ARGUMENTS, PROMPT, folder=tmp_path)
    fitting = [each for each in result.report["options"] if each["fits"]]
    assert fitting and all(0 < each["tpot_floor_ms"] < each["tpot_ms"] for each in fitting)
    assert all(each["tokens_per_joule"] > 0 for each in fitting)
    for num_cards in {each["world_size"] for each in fitting}:
        assert f"predicted on {num_cards} cards from published figures of NVIDIA GeForce RTX 4090; 4-" in result.stderr


def test_only_a_plan_compares(tmp_path: Path) -> None:
    result = run("topology=all", "hardware=cpu", folder=tmp_path)
    assert result.returncode != 0 and "topology=all compares ways to run, but task=generate" in result.stderr


def test_a_draft_model_takes_its_room_in_every_copy(tmp_path: Path) -> None:
    """As in the plan of such a run; a draft model that cannot be found is told."""
    asked = run_of(speculation=SpeculationConfig(SpeculationKind.draft, draft_path="org/small"))
    cards = cards_of(4)
    found = rank_options(asked, LLAMA_70B_AWQ, cards, 4, LLAMA_8B)
    four = next(each for each in found if (each.world_size, each.format) == (4, "awq"))
    single = plan_run(asked, place_ranks(asked, 4, cards), LLAMA_70B_AWQ, cards, draft=LLAMA_8B)
    assert four.predicted_bytes == max(card.predicted_bytes for card in single.cards)
    assert four.kv_tokens == single.kv_tokens_that_fit
    missing = f"speculation.draft_path={tmp_path / 'nothing'}"
    result = run(*ARGUMENTS, PROMPT, "speculation.kind=draft", missing, folder=tmp_path)
    assert result.returncode != 0 and "speculation.draft_path" in result.stderr


def shown(options: list[Option], aim: Aim = Aim.latency, width: int = 140) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(options_table(options, aim, 1))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_figures_are_shown_whatever_the_reasons_beside_them_take() -> None:
    fitting = Option(2, 1, "awq", True, "", 21 * GIB, 23932, 27.3, 347.0, 35.0)
    text = shown([fitting, Option(1, 2, "compressed-tensors", False, "why not " * 40)])
    assert all(figure in text for figure in ("2 x 1", "27.3", "347", "35", "23,932", "21.00")) and "why not" in text
    assert "the best for latency first" in text


def test_what_streams_layers_says_so() -> None:
    """A 70B in 4 bits fits one card with layers in host memory and two without; of neither are times known here."""
    alone, pair = (rank_options(run_of(), LLAMA_70B_AWQ, cards_of(num), num)[0] for num in (1, 2))
    assert alone.fits and alone.streamed_layers > 0
    assert f"streams {alone.streamed_layers} layers; why not " in shown([replace(alone, reason="why not")])
    assert f"streams {alone.streamed_layers} layers │" in shown([replace(alone, reason="")])
    assert pair.fits and pair.streamed_layers == 0 and "streams" not in shown([pair])


def test_checkpoint_in_fp8_is_compared_as_it_is() -> None:
    """Not as model.quantize=fp8 would round it, with other scales."""
    own = replace(LLAMA_8B, quantization="fp8", scheme=TYPICAL_SCHEMES["fp8"], linear_bits=8.0)
    run, cards = run_of(workload__prompt_tokens=512), cards_of(1)
    planned = plan_run(run, place_ranks(run, 1, cards), own, cards)
    found = [option for option in rank_options(run, own, cards, 1) if option.format == "fp8"]
    assert [option.predicted_bytes for option in found] == [planned.cards[0].predicted_bytes]


@pytest.mark.parametrize(
    ("asked", "stored", "name", "element_bytes"),
    [
        (DType.auto, "bfloat16", "bf16", 2),
        (DType.auto, "float16", "fp16", 2),
        (DType.auto, "float32", "fp32", 4),
        (DType.float32, "bfloat16", "fp32", 4),
        (DType.bfloat16, "float32", "bf16", 2),
    ],
)
def test_what_is_not_quantised_is_called_by_its_dtype(asked: DType, stored: str, name: str, element_bytes: int) -> None:
    """The one that it is planned in; its weights are more than the 8 billion of an 8B."""
    setting = run_of(model__dtype=asked)
    found = rank_options(setting, replace(LLAMA_8B, dtype=stored), cards_of(2), 2)
    assert {each.format for each in found} == {name, "int4", "int8", "fp8"}
    pair = next(each for each in found if (each.world_size, each.format) == (2, name))
    assert pair.predicted_bytes is not None and pair.predicted_bytes > 8e9 * element_bytes / 2


def test_checkpoint_that_says_float16_of_its_scales_is_compared_with_bf16() -> None:
    own = replace(LLAMA_8B, quantization="awq", scheme=TYPICAL_SCHEMES["awq"], linear_bits=4.15625, dtype="float16")
    found = {each.format: each for each in rank_options(run_of(), own, cards_of(2), 2) if each.world_size == 2}
    plain = {each.format: each for each in rank_options(run_of(), LLAMA_8B, cards_of(2), 2) if each.world_size == 2}
    assert found.pop("awq").fits and found == plain


def test_what_has_no_times_is_not_called_the_best_for_latency() -> None:
    untimed = [Option(1, 1, "bf16", True, "workload.prompt_tokens is not set", GIB, 1000)]
    assert "no times to rank by plan.aim=throughput" in shown(untimed, Aim.throughput)
    assert "the best for context first" in shown(untimed, Aim.context)


@pytest.mark.parametrize("source", ["nvml", "facts"])
def test_copies_share_the_memory_of_the_host(source: str) -> None:
    """Of a host that is not here the refusals do not say how much it has."""
    setting = run_of(limits__host_memory_gib=32.0, offload__enabled=OffloadKind.on)
    found = rank_options(setting, LLAMA_70B_AWQ, replace(cards_of(2), source=source), 2)
    by_cards = {each.world_size: each for each in found if each.format == "int4"}
    assert by_cards[2].fits
    assert by_cards[1].reason.startswith("host memory does not suffice: ") and by_cards[1].reason.endswith("of 16.00")


def test_draft_of_another_tokenizer_is_refused_here_too(tmp_path: Path) -> None:
    plan = ("task=plan", "topology=all", "hardware=rtx4090", "model=llama3_1_8b", "speculation.kind=draft")
    result = run(*plan, f"speculation.draft_path={DEMO}", folder=tmp_path / "run")
    assert "same tokenizer" in result.error["message"]
