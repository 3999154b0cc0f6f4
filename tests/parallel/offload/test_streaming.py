"""Models of which some layers are streamed from host memory answer as those that lie on the device."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from parallel.checkpoint.headers import read_checkpoint
from parallel.checkpoint.load import load_checkpoint
from parallel.communicator import Communicator
from parallel.engine.answer import StopRules
from parallel.engine.engine import Engine
from parallel.engine.generate import generate
from parallel.engine.speculation.speculator import Speculation
from parallel.engine.speculation.tree_plan import TreePlan
from parallel.engine.step_timer import time_steps
from parallel.layers.layout import ALIGNMENT, Layout
from parallel.offload.copies import Pairs
from parallel.offload.host_layers import HostLayers, HostLoader
from parallel.offload.spread import spread_layers
from parallel.offload.streamer import Streamer
from tests.parallel.engine.prefill.test_overlap import Cut, cut_passes
from tests.parallel.offload.streamed import answers, demo_runs, poisoned
from tests.parallel.quantized_models import NEXT, PROMPTS, write_pair
from tests.parallel.ranks import CPU, build, demo_tokenizer, forced_logits, make_engine, numbered, run_on_ranks
from tests.parallel.small_models import COMMON, CONFIGS, DEMO, prompts_of, write_model

FORCED = [[5, 6, 7], [8, 9, 10], [11, 12, 13], [14, 15, 16]]
NGRAM = Speculation("ngram", num_drafts=3)
TREE = Speculation("ngram", tree=TreePlan(10, 3, 1))
# Of the five layers of the demo model: one, an even and an odd number, the ends, all.
SETS = tuple((streamed, ()) for streamed in ((2,), (1, 3), (0, 2, 4), (0, 1, 2, 3, 4)))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("speculation", [None, NGRAM, TREE], ids=["plain", "ngram", "tree"])
def test_streamed_layers_answer_as_resident_ones(world_size: int, speculation: Speculation | None) -> None:
    for resident, *streamed in run_on_ranks(demo_runs, world_size, speculation, SETS):
        assert len(set(map(tuple, resident))) == len(resident)
        assert streamed == [resident] * len(SETS)


def logits_of(communicator: Communicator, folder: Path, prompts: list[list[int]], forced: list[list[int]]) -> Tensor:
    """Of the resident model and of the one with both layers streamed."""
    resident, streamed = make_engine(communicator, folder), make_engine(communicator, folder, streamed=(0, 1))
    found = [forced_logits(engine, prompts, forced) for engine in (resident, poisoned(streamed))]
    assert streamed.streamer is not None
    layers = streamed.model.model.layers
    staging = streamed.streamer.buffers.untyped_storage().data_ptr()
    held = {tensor.untyped_storage().data_ptr() for tensor in (*layers.parameters(), *layers.buffers())}
    assert held == {staging}, "nothing of a streamed layer has memory of its own"
    return torch.stack(found)


@pytest.mark.parametrize("name", ["awq", "w4a16 act order", "nf4 nested", "fp8 by block"])
def test_packed_weights_travel_packed_and_whole(name: str, tmp_path: Path) -> None:
    folder = write_pair(name, tmp_path) / "quantized"
    resident, streamed = run_on_ranks(logits_of, 1, folder, PROMPTS, [[token] for token in NEXT])[0]
    assert torch.isfinite(resident).all()
    assert torch.equal(resident, streamed)


@pytest.mark.parametrize("name", ["llama_with_biases", "qwen3", "llama_tied"])
def test_biases_and_norms_travel_too(name: str, folders: dict[str, Path]) -> None:
    resident, streamed = run_on_ranks(logits_of, 1, folders[name], prompts_of(name), FORCED)[0]
    assert torch.equal(resident, streamed)


def cut_states(communicator: Communicator, folder: Path, cut: Cut) -> tuple[Tensor, Tensor]:
    """Logits of the resident model and the streamed one, whose prompts are cut."""
    cut_passes(cut)
    engines = make_engine(communicator, folder), poisoned(make_engine(communicator, folder, streamed=range(4)))
    resident, streamed = (forced_logits(engine, prompts_of("llama"), FORCED) for engine in engines)
    return resident, streamed


@pytest.mark.parametrize(
    "cut", [Cut(3), Cut(3, joined=(1, 2)), Cut(2, dequantizes=True)], ids=["sections", "joined", "halves"]
)
def test_passes_that_are_cut_add_the_biases_of_layers_that_are_gone(tmp_path: Path, cut: Cut) -> None:
    """Those of down projections are added in the next layer, when a third one may lie in the place of theirs."""
    sizes = COMMON | {"num_hidden_layers": 4}
    folder = write_model(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True, tie_word_embeddings=False), tmp_path)
    for resident, streamed in run_on_ranks(cut_states, 2, folder, cut):
        assert torch.equal(resident, streamed)


def steps_to_an_end(communicator: Communicator) -> list[int]:
    """Those of an answer that ends after six tokens: of the resident model, and with layers in host memory, on the
    disk."""
    prompt = numbered(prompts_of("demo")[:1])
    (tokens,) = answers(make_engine(communicator, DEMO), prompt)
    assert tokens[5] not in tokens[:5]

    def num_steps(engine: Engine) -> int:
        steps, step = [], engine.step
        engine.step = lambda sequences: steps.append(0) or step(sequences)  # type: ignore[method-assign]
        (answer,) = generate(engine, prompt, demo_tokenizer(), StopRules(50, frozenset({tokens[5]}))).answers
        assert answer.token_ids == tokens[:6]
        return len(steps)

    places = ({}, {"streamed": (1, 3)}, {"on_disk": (2,)})
    return [num_steps(make_engine(communicator, DEMO, **each)) for each in places]


def test_no_pass_is_streamed_after_an_end_of_sequence() -> None:
    assert run_on_ranks(steps_to_an_end, 1)[0] == [6, 5, 5]


def left_of_short_answers(communicator: Communicator) -> tuple[list[int], int]:
    """How long answers are that end with their first token, and of how many the engine keeps that."""
    engine, prompts = make_engine(communicator, DEMO, streamed=(1, 3)), numbered(prompts_of("demo"))
    firsts = frozenset(answer[0] for answer in answers(engine, prompts))
    found = generate(engine, prompts, demo_tokenizer(), StopRules(5, firsts)).answers
    return [len(each.token_ids) for each in found], len(engine.fresh)


def test_nothing_is_kept_of_answers_that_their_first_token_ended() -> None:
    ((lengths, num_kept),) = run_on_ranks(left_of_short_answers, 1)
    assert set(lengths) == {1} and num_kept == 0


def interrupted(communicator: Communicator) -> tuple[list[list[int]], list[list[int]], list[float]]:
    """Answers before and after a pass that ended in the middle, and after timed steps."""
    engine, prompts = make_engine(communicator, DEMO, streamed=(0, 2, 3)), numbered(prompts_of("demo"))
    before = answers(engine, prompts)
    assert engine.streamer is not None
    passing = engine.streamer.through(engine.model.model.layers, 1)
    for _ in range(4):
        next(passing)
    passing.close()
    after = answers(engine, prompts)
    return before, after, time_steps(engine, [17, 5], 2, communicator)


def test_a_pass_that_fails_leaves_the_next_one_whole() -> None:
    before, after, times = run_on_ranks(interrupted, 1)[0]
    assert before == after
    assert min(times) > 0


def bytes_held(communicator: Communicator, folder: Path) -> tuple[int, int, int, int, bool]:
    """Of the parameters that a loaded model still has on the device; of all; on the host; staged; whether the embedding
    lies on the host."""
    model, layers = build(communicator, folder), HostLayers((0, 1), CPU)
    whole = sum(parameter.nbytes for parameter in model.module.parameters())
    load_checkpoint(model, read_checkpoint(folder), CPU, on_placed=HostLoader(model.module, layers))
    embedding, hosted = model.module.model.embed_tokens.weight, layers.embedding
    is_hosted = hosted is not None and embedding.data_ptr() == hosted.buffer.memory.data_ptr()
    held = [
        tensor for tensor in model.module.parameters() if not (tensor.is_meta or (is_hosted and tensor is embedding))
    ]
    resident = sum(tensor.nbytes for tensor in held)
    return resident, whole, layers.num_bytes, Streamer(layers).buffers.nbytes, is_hosted


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_what_is_streamed_is_on_the_host_alone(name: str, folders: dict[str, Path]) -> None:
    """And the embedding, unless it is the head."""
    resident, whole, on_host, staged, is_hosted = run_on_ranks(bytes_held, 1, folders[name])[0]
    padding = 2 * 6 * ALIGNMENT
    assert resident < whole
    assert whole - resident <= on_host <= whole - resident + padding
    assert is_hosted == (name == "llama")
    config = CONFIGS[name]
    embedding = config.vocab_size * config.hidden_size * 4 if is_hosted else 0
    assert staged == on_host - embedding


def test_layout_holds_every_tensor_apart_and_aligned() -> None:
    layer = nn.Sequential(nn.Linear(3, 5, dtype=torch.bfloat16), nn.BatchNorm1d(5), nn.Linear(5, 1, bias=False))
    layer.requires_grad_(requires_grad=False)
    layout, before = Layout.of(layer), [tensor.clone() for tensor in layer.state_dict().values()]
    memory = torch.full((layout.num_bytes,), 0x5A, dtype=torch.uint8)
    places = [(view.data_ptr() - memory.data_ptr(), view.nbytes) for view in layout.views(memory)]
    assert all(start % ALIGNMENT == 0 for start, _ in places)
    assert all(start + size <= following for (start, size), (following, _) in pairwise(places))
    for view, tensor in zip(layout.views(memory), layout.tensors(), strict=True):
        view.copy_(tensor)
    layout.unbind()
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    layout.bind(layout.views(memory))
    for found, expected in zip(layer.state_dict().values(), before, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("num_layers", [1, 5, 32, 80])
def test_streamed_layers_are_spread_evenly_round_the_pass(num_layers: int) -> None:
    for num_streamed in range(1, num_layers + 1):
        indices = spread_layers(num_layers, num_streamed)
        assert len(set(indices)) == num_streamed
        assert all(0 <= index < num_layers for index in indices)
        gaps = [after - before for before, after in pairwise([*indices, indices[0] + num_layers])]
        assert max(gaps) - min(gaps) <= 1


class Recorder:
    """A copy queue of an endless engine: what has been asked of it, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def copy(self, pairs: Pairs, buffer: int) -> None:
        self.calls.append(("copy", buffer))
        for source, target in pairs:
            target.copy_(source)

    def wait_copied(self, buffer: int) -> None:
        self.calls.append(("wait", buffer))

    def mark_used(self, buffer: int) -> None:
        self.calls.append(("used", buffer))


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_buffers_take_turns_and_copies_follow_their_last_use(num_layers: int) -> None:
    """Over three passes: a buffer is waited for before use, marked after it, and copied to at once then."""
    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(num_layers)).requires_grad_(requires_grad=False)
    kept = HostLayers(range(num_layers), CPU)
    for index, layer in enumerate(layers):
        kept.keep(index, layer)
    streamer, recorder = Streamer(kept), Recorder()
    streamer.copies = recorder
    for _ in range(3):
        for layer in streamer.through(layers, 1):
            assert not layer.weight.is_meta
    start, steady = recorder.calls[:4], recorder.calls[4:]
    assert start == [("used", 0), ("copy", 0), ("used", 1), ("copy", 1)]
    turns = [place % 2 for place in range(3 * num_layers)]
    assert steady == [call for turn in turns for call in (("wait", turn), ("used", turn), ("copy", turn))]
