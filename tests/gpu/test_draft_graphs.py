"""Drafts as graphs beside layers that are streamed: what launches give, token for token, and what that saves."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from launcher.config import ModelFacts
from launcher.models.shape import shape_from_facts
from launcher.tasks.weights import config_of_shape
from parallel.checkpoint.dummy import fill_dummy
from parallel.checkpoint.headers import read_checkpoint
from parallel.checkpoint.load import load_checkpoint
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.communicator import Communicator
from parallel.engine.answer import StopRules
from parallel.engine.engine import Engine
from parallel.engine.generate import generate
from parallel.engine.limits import EngineLimits
from parallel.engine.sampling import SamplingParams
from parallel.engine.speculation.speculator import Speculation
from parallel.engine.speculation.tree_plan import PLAIN, TreePlan
from parallel.engine.step_timer import prepared_step, time_drafts
from parallel.layers.merged import LayerMerger
from parallel.offload.host_layers import HostLayers, HostLoader
from parallel.offload.spread import spread_layers
from parallel.partition import choose_grain
from parallel.shard import ShardedModel, build_sharded_model, share_process_group
from tests.gpu.one_card import DEVICE, run_on_one_card
from tests.gpu.test_speculation import SAMPLED as SAMPLED_ARGS
from tests.launcher.cli import run
from tests.parallel.engine.speculation.draft_models import write_truncated
from tests.parallel.engine.speculation.test_auto_speculation import script
from tests.parallel.ranks import build, demo_tokenizer, numbered
from tests.parallel.small_models import DEMO, prompts_of

pytestmark = pytest.mark.gpu

PLANS = (TreePlan(4, 3, 2), TreePlan(20, 4, 5))
CHAIN = Speculation("draft", num_drafts=3)
TREE = Speculation("draft", tree=PLANS[1])
AUTO = Speculation("draft", choices=PLANS)
SAMPLED = SamplingParams(temperature=0.8, top_k=20, top_p=0.95, seed=3)
# Answers, and how often so many drafts came true.
Found = tuple[list[list[int]], Counter[int]]


def load_demo(communicator: Communicator, folder: Path, streamed: tuple[int, ...]) -> tuple[ShardedModel, HostLayers]:
    model, layers = build(communicator, folder, torch.float32), HostLayers(streamed, DEVICE)
    on_placed = HostLoader(model.module, layers) if streamed else LayerMerger(model.module)
    load_checkpoint(model, read_checkpoint(folder), DEVICE, on_placed=on_placed)
    return model, layers


def answer(
    communicator: Communicator,
    draft: Path,
    speculation: Speculation,
    sampling: SamplingParams | None,
    *,
    graphs: bool,
) -> Found:
    """Of four prompts in three rows, with graphs of one, two and three."""
    model, layers = load_demo(communicator, DEMO, (1, 3))
    small, _ = load_demo(communicator, draft, ())
    limits = EngineLimits(max_context=128, batch_size=3, prefill_chunk=16)
    speculation = replace(speculation, draft=small.module)
    engine = Engine(model.module, communicator, limits, sampling=sampling, speculation=speculation, host_layers=layers)
    assert engine.captures_drafts
    assert not engine.captures
    for each in engine.drafting:
        assert each.graphs is not None
        assert set(each.graphs.recorded) == {1, 2, 3}
        each.graphs = each.graphs if graphs else None
    if engine.plan is not None:
        script(engine, [*PLANS, PLAIN, *PLANS])
    result = generate(engine, numbered(prompts_of("demo")), demo_tokenizer(), StopRules(30))
    return [each.token_ids for each in result.answers], result.acceptance.lengths


def both_ways(communicator: Communicator, draft: Path) -> dict[str, tuple[Found, Found]]:
    share_process_group(torch.device("cpu"))
    kinds, draws = {"chain": CHAIN, "tree": TREE, "auto": AUTO}, {"greedy": None, "sampled": SAMPLED}

    def each_way(kind: str, draw: str) -> tuple[Found, Found]:
        launched, replayed = (
            answer(communicator, draft, kinds[kind], draws[draw], graphs=graphs) for graphs in (False, True)
        )
        return launched, replayed

    return {f"{kind}, {draw}": each_way(kind, draw) for kind in kinds for draw in draws}


@pytest.mark.parametrize("world_size", [1, 2])
def test_graphs_guess_what_launches_do(world_size: int, tmp_path: Path) -> None:
    """Answers, and drafts as right as they were: a wrong one would not show in answers."""
    draft = write_truncated(DEMO, tmp_path / "draft", 3)
    for found in run_on_one_card(both_ways, world_size, tmp_path, draft):
        for name, (launched, replayed) in found.items():
            print(f"{name} on {world_size}: {dict(replayed[1])}")
            assert replayed == launched, name
            assert launched[1].total() > launched[1][0] > 0


# hidden, intermediate, layers, heads, KV heads, head_dim, vocabulary, positions: of Llama's 70B, some layers, and 8B.
LARGE = ModelFacts(8192, 28672, 16, 64, 8, 128, 128256, 131072)
SMALL = ModelFacts(4096, 14336, 32, 32, 8, 128, 128256, 131072)
NUM_STREAMED = 12


def made_up(communicator: Communicator, facts: ModelFacts, layers: HostLayers | None) -> PreTrainedModel:
    """In 4 bits."""
    grain = choose_grain((facts.intermediate_size, facts.vocab_size), 1)
    model = build_sharded_model(
        config_of_shape(shape_from_facts(facts)), communicator, dtype=torch.bfloat16, grain=grain
    )
    on_placed = LayerMerger(model.module) if layers is None else HostLoader(model.module, layers)
    fill_dummy(model, QUANTIZE_SCHEMES["int4"], DEVICE, on_placed=on_placed)
    return model.module


def following(run_step: Callable[[], None], num: int = 10) -> float:
    """Median milliseconds of steps each of which is queued once the one before it is done."""
    times = []
    for _ in range(num + 2):
        start = time.perf_counter()
        run_step()
        torch.cuda.current_stream(DEVICE).synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


def costs(communicator: Communicator) -> list[dict[str, float]]:
    share_process_group(torch.device("cpu"))
    layers = HostLayers(spread_layers(LARGE.num_layers, NUM_STREAMED), DEVICE)
    large, small = made_up(communicator, LARGE, layers), made_up(communicator, SMALL, None)
    found = []
    # The default tree, and one that takes longer than two layers take to come.
    for tree in (TreePlan(64, 6, 6), TreePlan(64, 12, 8)):
        gc.collect()
        speculation = Speculation("draft", tree=tree, draft=small)
        reserved, start = torch.cuda.memory_reserved(), time.perf_counter()
        engine = Engine(large, communicator, EngineLimits(1024, 1, 512), speculation=speculation, host_layers=layers)
        torch.cuda.synchronize()
        opened = {"depth": tree.depth, "open_sec": time.perf_counter() - start}
        opened["open_mib"] = (torch.cuda.memory_reserved() - reserved) / 2**20
        graphs = [each.graphs for each in engine.drafting]
        for name, chosen in (("launched", [None]), ("replayed", graphs)):
            for each, its in zip(engine.drafting, chosen, strict=True):
                each.graphs = its
            drafts = statistics.median(time_drafts(engine, [513], 5, communicator))
            with prepared_step(engine, [513], communicator) as step:
                opened |= {f"{name}_draft_ms": drafts, f"{name}_step_ms": following(step)}
        with prepared_step(engine, [513], communicator, engine.plain_rows) as step:
            opened["plain_ms"] = following(step)
        found.append(opened)
        del engine, graphs, speculation
    return found


def test_what_graphs_save(tmp_path: Path) -> None:
    """Twelve of sixteen layers of a 70B streamed, a draft model of 8B, both in 4 bits."""
    for row in run_on_one_card(costs, 1, tmp_path, timeout_sec=100)[0]:
        print(json.dumps({name: round(value, 2) for name, value in row.items()}))
        assert min(row.values()) > 0


def test_a_run_takes_the_memory_that_is_planned(tmp_path: Path) -> None:
    """Of graphs that torch's allocator does not see, only the whole tells."""
    folder = tmp_path / "draft"
    config_of_shape(shape_from_facts(SMALL)).save_pretrained(folder)
    report = run(
        *("task=bench", "gpus=1", "model=llama3_3_70b", "model.path=nobody/has-this", "model.quantize=int4"),
        *("model.shape.num_layers=10", "model.weights=dummy", "offload.resident_layers=3", "offload.host_layers=0"),
        *("speculation.kind=draft", f"speculation.draft_path={folder}", "speculation.draft_quantize=int4"),
        *("speculation.tree_size=64", "workload.output_tokens=16", "workload.repeats=1", "engine.max_context=1024"),
        *SAMPLED_ARGS,
        folder=tmp_path / "run",
        env={"HF_HUB_OFFLINE": "1"},
    ).report
    assert report.get("error") is None, report["error"]
    card, lines = report["cards"][0], report["predicted"]["cards"][0]["lines"]
    names = ("speculation", "ttft_ms", "tpot_ms", "offload", "decode_step_ms", "warm_up_sec")
    print(json.dumps({name: report[name] for name in names}))
    print(json.dumps({"lines": lines, "predicted": card["predicted_bytes"], "peak": card["peak_bytes"]}))
    print(json.dumps(card["memory"]))
    assert lines["graphs"] > 0
    torch_bytes = sum(size for part, size in lines.items() if part not in ("context", "communicator"))
    assert card["memory"]["allocated_peak_bytes"] <= 1.03 * torch_bytes
