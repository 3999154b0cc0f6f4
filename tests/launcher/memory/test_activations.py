"""What a plan says that passes take, against what torch allocates for them on a CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from launcher.config import ModelFacts
from launcher.memory.activations import activations_bytes, attended_bytes
from launcher.memory.demand import Demand
from launcher.models.shape import shape_from_facts
from launcher.tasks.weights import config_of_shape
from parallel.checkpoint.dummy import fill_dummy
from parallel.communicator import Around, Communicator
from parallel.engine.engine import Engine
from parallel.engine.limits import EngineLimits
from parallel.engine.prefill.part_attention import attend_parts
from parallel.engine.prefill.section_sizes import SECTIONS
from parallel.engine.sampling import SamplingParams
from parallel.engine.sequence import Part, TokenSequence
from parallel.engine.speculation.speculator import Speculation
from parallel.engine.speculation.tree_plan import TreePlan
from parallel.kernels import paged_attention
from parallel.kernels.pages import FP8, allocate_pages, pages_for
from parallel.partition import choose_grain
from parallel.shard import build_sharded_model
from tests.launcher.cli import wait_until
from tests.parallel.memory import peak_bytes
from tests.parallel.ranks import CPU, run_on_ranks

# hidden, intermediate, layers, heads, KV heads, head_dim, vocabulary, positions
FACTS = ModelFacts(256, 512, 2, 4, 2, 64, 512, 4096)
LIMITS = EngineLimits(max_context=512, batch_size=2, prefill_chunk=256)
SAMPLED = SamplingParams(temperature=0.8, top_k=50, top_p=0.9)
# What decides each sum: a model that is wide in one thing, or a workload.
CASES = {
    "norm": (replace(FACTS, hidden_size=2048), LIMITS, SamplingParams()),
    "heads": (replace(FACTS, num_heads=32), LIMITS, SamplingParams()),
    "mlp": (replace(FACTS, intermediate_size=4096), LIMITS, SamplingParams()),
    "context": (FACTS, EngineLimits(max_context=4096, batch_size=1, prefill_chunk=64), SamplingParams()),
    "mask": (FACTS, EngineLimits(max_context=4096, batch_size=1, prefill_chunk=512), SamplingParams()),
    # On two ranks the pass goes in halves.
    "halves": (
        replace(FACTS, num_heads=32, num_kv_heads=4),
        EngineLimits(max_context=1280, batch_size=1, prefill_chunk=1024),
        SamplingParams(),
    ),
    "decode": (FACTS, EngineLimits(max_context=1024, batch_size=6, prefill_chunk=32), SamplingParams()),
    "sampling": (replace(FACTS, vocab_size=16384), replace(LIMITS, batch_size=8, max_context=64), SAMPLED),
}
# Of a sequence that checks 32 tokens in a step, without a model that drafts them.
TREE = Speculation("ngram", tree=TreePlan(32, 8, 1))
SHORT = replace(LIMITS, batch_size=6, max_context=64)
TREE_CASES = {
    "tree": (FACTS, EngineLimits(max_context=2048, batch_size=4, prefill_chunk=32), SamplingParams()),
    "tree_greedy": (replace(FACTS, vocab_size=8192), SHORT, SamplingParams()),
    "tree_sampled": (replace(FACTS, vocab_size=8192), SHORT, SAMPLED),
    "tree_rows": (replace(FACTS, intermediate_size=4096), replace(SHORT, prefill_chunk=16), SamplingParams()),
}


DTYPES = ("float32", "bfloat16")
Measured = dict[tuple[str, str], int]


class Released(Around):
    """Waits until gloo's thread has let go of a message, which it does a moment after it is done; what is given back in
    that thread torch's profiler does not see."""

    name = "gloo"

    def all_reduce(self, tensor: Tensor) -> Tensor:
        before = num_holders(tensor)
        self.inner.all_reduce(tensor.view_as(tensor))
        return wait_for_holders(tensor, before)

    def all_gather(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        before = num_holders(tensor)
        gathered = self.inner.all_gather(tensor.view_as(tensor))
        wait_for_holders(tensor, before)
        return wait_for_holders(gathered, num_holders(torch.empty(1)))


def wait_for_holders(tensor: Tensor, num: int) -> Tensor:
    wait_until(lambda: num_holders(tensor) <= num, "the end of a message", poll_sec=0.0001)
    return tensor


def num_holders(tensor: Tensor) -> int:
    """Of its memory: tensors, of which views count."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def measure_all(communicator: Communicator) -> Measured:
    if communicator.world_size > 1:
        communicator = Released(communicator)
    plain = {
        (case, dtype): measured_bytes(communicator, *CASES[case], dtype, None) for case in CASES for dtype in DTYPES
    }
    return plain | {
        (case, dtype): measured_bytes(communicator, *TREE_CASES[case], dtype, TREE)
        for case in TREE_CASES
        for dtype in DTYPES
    }


def measured_bytes(
    communicator: Communicator,
    facts: ModelFacts,
    limits: EngineLimits,
    sampling: SamplingParams,
    dtype: str,
    speculation: Speculation | None,
) -> int:
    """The most of passes at the end of prompts that fill the context, the draws of their answers, and a step."""
    engine = make_engine(communicator, facts, limits, sampling, dtype, speculation)
    sequences = [TokenSequence(row, [3] * (limits.max_context - 1), 2) for row in range(limits.batch_size)]
    for sequence in sequences:
        sequence.pages = engine.pages.allocate(engine.limits.pages_of(sequence.num_tokens))
    logits: list[Tensor] = []

    def prefill(room: int) -> None:
        logits.append(engine.prefill(last_parts(sequences, room)))

    # Of a pass with fewer tokens more may be computed at once.
    rooms = (limits.prefill_chunk, *(most for most, _ in SECTIONS if most < limits.prefill_chunk))
    peaks = [peak_bytes(partial(prefill, room)) for room in rooms]
    rows = logits[0][-1:].expand(len(sequences), -1).contiguous()
    peaks.append(rows.nbytes + peak_bytes(lambda: engine.start_answers(sequences, rows)))
    peaks.append(peak_bytes(lambda: engine.step(sequences)))
    return max(peaks)


def last_parts(sequences: list[TokenSequence], room: int) -> list[Part]:
    """The ends of as many prompts as a pass has room for."""
    parts = []
    for sequence in sequences:
        end = len(sequence.prompt)
        start = max(0, end - room)
        room -= end - start
        parts += [Part(sequence, start, end)] if end > start else []
    return parts


def make_engine(
    communicator: Communicator,
    facts: ModelFacts,
    limits: EngineLimits,
    sampling: SamplingParams,
    dtype: str,
    speculation: Speculation | None,
) -> Engine:
    config = config_of_shape(shape_from_facts(facts))
    grain = choose_grain((facts.intermediate_size, facts.vocab_size), communicator.world_size)
    model = build_sharded_model(config, communicator, dtype=getattr(torch, dtype), grain=grain)
    fill_dummy(model, None, CPU)
    return Engine(model.module, communicator, limits, sampling=sampling, speculation=speculation)


@pytest.fixture(scope="module", params=(1, 2))
def ranks(request: pytest.FixtureRequest) -> list[Measured]:
    return run_on_ranks(measure_all, request.param)


@pytest.mark.parametrize("kv_dtype", ("auto", "fp8"))
@pytest.mark.parametrize("max_context", (960, 9600))
def test_what_parts_attend_to_takes_what_is_predicted(kv_dtype: str, max_context: int) -> None:
    """Two tokens each of prompts of `max_context`, at once or one after the other; queries and masks are small."""
    facts, num_parts = replace(FACTS, num_heads=8, num_kv_heads=8), 6
    demand = Demand(shape_from_facts(facts), 1, 64, "bfloat16", kv_dtype, "cpu", "solo", num_parts, 2 * num_parts)
    pages = pages_for(max_context)
    dtype = FP8 if kv_dtype == "fp8" else torch.bfloat16
    cache = allocate_pages(1, 1 + num_parts * pages, 8, facts.head_dim, dtype, CPU)[0]
    parts = [
        Part(TokenSequence(row, [], 1, pages=list(range(1 + row * pages, 1 + (row + 1) * pages))), end - 2, end)
        for row, end in enumerate([max_context] * num_parts)
    ]
    query = torch.randn(2 * num_parts, 8, facts.head_dim).to(torch.bfloat16)
    gathered = EngineLimits(max_context, num_parts, 2 * num_parts).gathered_keys
    measured = peak_bytes(lambda: attend_parts(parts, 1.0, gathered)(query, cache))
    predicted = attended_bytes(demand, 0, 2 * num_parts, max_context)
    assert 0.95 * measured <= predicted <= 1.3 * measured


# Small ones are left out; plain torch need not copy what is in the right dtype or order already (a rank's only head).
LEAST, MOST = 0.95, 1.6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", (*CASES, *TREE_CASES))
def test_passes_take_what_is_predicted(ranks: list[Measured], case: str, dtype: str) -> None:
    facts, limits, sampling = (CASES | TREE_CASES)[case]
    grain = choose_grain((facts.intermediate_size, facts.vocab_size), len(ranks))
    sizes = limits.batch_size, limits.prefill_chunk
    demand = Demand(
        shape_from_facts(facts),
        len(ranks),
        grain,
        dtype,
        "auto",
        "cpu",
        "gloo",
        *sizes,
        is_sampled=sampling.temperature > 0,
    )
    if case in TREE_CASES:
        assert TREE.tree is not None
        demand = replace(demand, rows_per_sequence=TREE.tree.size, num_ahead=TREE.num_ahead)
    for measured, lines in zip(ranks, demand.lines(limits.max_context), strict=True):
        assert LEAST * measured[case, dtype] <= lines["activations"] <= MOST * measured[case, dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "facts",
    [FACTS, replace(FACTS, head_dim=96), replace(FACTS, num_heads=32), replace(FACTS, num_heads=34)],
    ids=["kernel", "heads of 96", "16 heads", "17 heads"],
)
def test_steps_that_attend_in_plain_torch_on_a_card_are_counted(
    facts: ModelFacts, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel itself refuses; then all sequences' keys in float32 are there at a time."""
    monkeypatch.setattr(paged_attention, "has_tensor_cores", lambda device: True)
    monkeypatch.setattr(paged_attention, "load_problem", lambda load, *arguments: None)
    stored = getattr(torch, dtype)
    refusal = paged_attention.find_refusal.__wrapped__(
        facts.num_heads, facts.head_dim, facts.num_kv_heads, stored, stored, torch.device("cuda", 0)
    )
    demand = Demand(shape_from_facts(facts), 1, 64, dtype, "auto", "cuda", "solo", 8, 64)
    gathered = 8 * 8192 * facts.num_kv_heads * facts.head_dim * 4
    assert (activations_bytes(demand, 0, 8192) > 2 * gathered) == (refusal is not None)


def test_norms_of_a_card_in_other_than_bf16_are_counted() -> None:
    """They are in plain torch, whose copies are in float32."""
    shape = shape_from_facts(replace(FACTS, hidden_size=8192))
    taken = {
        dtype: activations_bytes(Demand(shape, 1, 64, dtype, "auto", "cuda", "solo", 1, 512), 0, 512)
        for dtype in ("bfloat16", "float16")
    }
    assert taken["float16"] >= taken["bfloat16"] + 512 * 8192 * 4
