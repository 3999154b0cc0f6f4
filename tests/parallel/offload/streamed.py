"""Engines whose layers come from elsewhere in every pass, and what they answer."""

from __future__ import annotations

from collections.abc import Sequence

from parallel.communicator import Communicator
from parallel.engine.answer import StopRules
from parallel.engine.engine import Engine
from parallel.engine.generate import Prompt, generate
from parallel.engine.speculation.speculator import Speculation
from parallel.offload.disk_layers import DiskLayers
from tests.parallel.ranks import demo_tokenizer, make_engine, numbered
from tests.parallel.small_models import DEMO, prompts_of

# Layers in host memory, and those on the disk.
Places = tuple[Sequence[int], Sequence[int]]


def disk_of(engine: Engine) -> DiskLayers:
    assert engine.streamer is not None and engine.streamer.disk is not None
    return engine.streamer.disk


def poisoned(engine: Engine) -> Engine:
    """What is not copied or read before it is used shows."""
    assert engine.streamer is not None
    engine.streamer.buffers.fill_(0xFF)
    if engine.streamer.disk is not None:
        disk_of(engine).reads.ring.memory.fill_(0xFF)
    return engine


def answers(engine: Engine, prompts: list[Prompt], num_tokens: int = 12) -> list[list[int]]:
    return [answer.token_ids for answer in generate(engine, prompts, demo_tokenizer(), StopRules(num_tokens)).answers]


def demo_runs(
    communicator: Communicator, speculation: Speculation | None, places: Sequence[Places]
) -> list[list[list[int]]]:
    """Answers of the resident model, then by each place of its layers, of more ragged prompts than rows, in chunks."""
    prompts = numbered(prompts_of("demo"))
    settings = {"prefill_chunk": 7, "batch_size": 3, "speculation": speculation}
    found = [answers(make_engine(communicator, DEMO, **settings), prompts)]
    for streamed, on_disk in places:
        engine = poisoned(make_engine(communicator, DEMO, streamed=streamed, on_disk=on_disk, **settings))
        found.append(answers(engine, prompts))
        # A second time, when buffers hold what the first passes left.
        assert answers(engine, prompts, 4) == [tokens[:4] for tokens in found[-1]]
        assert all(engine.model.model.layers[index].input_layernorm.weight.is_meta for index in on_disk)
    return found
