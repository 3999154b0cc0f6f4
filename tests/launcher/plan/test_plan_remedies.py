"""What a refusal says would fit, asked for as it says."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from launcher.config import (
    HardwareConfig,
    HardwareKind,
    KVDType,
    LimitsConfig,
    OffloadConfig,
    OffloadKind,
    PeerAccess,
    RunConfig,
    TopologyKind,
)
from launcher.config.offload import KVPlace
from launcher.hardware.inventory import Inventory, read_inventory
from launcher.models.shape import ModelShape, quantized_shape
from launcher.plan.plan import Plan, plan_run
from launcher.plan.topology import PlanError, place_ranks, resolve_world_size
from tests.launcher.plans import LLAMA_8B, LLAMA_70B, LLAMA_70B_AWQ, RESIDENT, cards_of, plan, refused, run_of

# Of a run, by the key in the message; sums of tokens are one token of prompt and the answer.
FIELDS: dict[str, tuple[str, Any]] = {
    "engine.max_context": ("engine__max_context", int),
    "engine.kv_dtype": ("engine__kv_dtype", KVDType),
    "workload.batch_size": ("workload__batch_size", int),
    "offload.enabled": ("offload__enabled", OffloadKind),
    "offload.kv": ("offload__kv", KVPlace),
    "offload.resident_layers": ("offload__resident_layers", int),
    "offload.disk": ("offload__disk", str),
    "topology": ("topology__kind", TopologyKind),
    "gpus": ("gpus", int),
}
OTHER_HARDWARE = ("more free host memory", "a smaller model, or more memory")
LONG = {"workload__batch_size": 32, "workload__prompt_tokens": 2000}
HOST, AUTO = ({"offload__enabled": OffloadKind.on, "offload__kv": place} for place in (KVPlace.host, KVPlace.auto))


def remedies(message: str) -> list[str]:
    """Each by itself, as the message has them."""
    found = message.partition("What would fit: ")[2].removesuffix(".").split("; or ")
    return [each for some in found for each in re.split(r" or (?=model\.quantize)", some) if each not in OTHER_HARDWARE]


def asked_for(remedy: str, shape: ModelShape, changes: dict[str, Any]) -> tuple[RunConfig, ModelShape]:
    asked = dict(changes)
    for key, value in re.findall(r"([a-z_.]+)=(\w+)", remedy):
        if key == "model.quantize":
            shape = quantized_shape(shape, value)
        elif key == "workload.output_tokens":
            asked |= {"workload__prompt_tokens": 1, "workload__output_tokens": int(value) - 1}
        else:
            name, kind = FIELDS[key]
            asked[name] = kind(value)
    for name in re.findall(r"without offload\.(\w+)", remedy):
        del asked[f"offload__{name}"]
    # Of its own: fields of it are set.
    return run_of(**{"offload": OffloadConfig()} | asked), shape


def check_layers(remedy: str, decided: Plan) -> None:
    """As many are streamed, or have keys and values in host memory, as it said."""
    offload = decided.offload
    for num in map(int, re.findall(r"which streams (\d+) ", remedy)):
        assert offload is not None and len(offload.streamed_layers + offload.disk_layers) == num, remedy
    for num in map(int, re.findall(r"keys and values of (\d+) layers", remedy)):
        # Of a token: two of 8 heads of 128 numbers.
        assert offload is not None and sum(offload.kv_bytes_per_token) == num * 2 * 8 * 128 * 2, remedy


@pytest.mark.parametrize("host_gib", [20, 40, 512])
@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        (LLAMA_70B, {"gpus": 1}),
        (LLAMA_70B, {"gpus": 1, "engine__max_context": 30000}),
        (LLAMA_70B, {"gpus": 2, "offload__enabled": OffloadKind.on}),
        (LLAMA_70B, {"gpus": 1, "offload__resident_layers": 30}),
        (LLAMA_70B, {"gpus": 1, "offload__resident_layers": 80, "offload__host_layers": 8}),
        (LLAMA_70B, {"gpus": 2, "offload__host_layers": 8}),
        (LLAMA_70B, {"gpus": 4, "offload__resident_layers": 70, "limits__host_memory_gib": 8}),
        (LLAMA_70B_AWQ, {"gpus": 1, "offload__resident_layers": 80}),
        (LLAMA_70B_AWQ, {"gpus": 2, "offload__resident_layers": 79, **LONG}),
        (LLAMA_70B_AWQ, {"gpus": 1, "offload__resident_layers": 60, "offload__disk": "checkpoint"}),
        (LLAMA_70B, {"gpus": 1, "topology__kind": TopologyKind.single, "offload__enabled": OffloadKind.off}),
        (LLAMA_70B_AWQ, {"gpus": 1, **LONG}),
        (LLAMA_70B_AWQ, {"gpus": 1, **LONG, **HOST}),
        (LLAMA_70B_AWQ, {"gpus": 1, **LONG, **AUTO}),
        (LLAMA_70B_AWQ, {"gpus": 2, **LONG}),
        (LLAMA_70B_AWQ, {"gpus": 1, "offload__disk": "checkpoint", **LONG}),
        (LLAMA_8B, {"gpus": 1, "engine__max_context": 100_000, "workload__prompt_tokens": 90_000}),
    ],
)
def test_what_a_refusal_names_is_planned(shape: ModelShape, changes: dict[str, Any], host_gib: int) -> None:
    """With no more of host memory; and keys that contradict one another are told before a plan."""
    room = {"host_memory_bytes": host_gib * 2**30, "host_free_bytes": host_gib * 2**30}
    first = run_of(**{"offload": OffloadConfig()} | changes)
    num_cards = resolve_world_size(first, None)
    cards = replace(cards_of(num_cards), **room)
    try:
        plan_run(first, place_ranks(first, num_cards, cards), shape, cards)
    except PlanError as error:
        for remedy in remedies(str(error)):
            run, other = asked_for(remedy, shape, changes)
            assert [*run.problems()] == [], remedy
            more = replace(cards_of(resolve_world_size(run, None)), **room)
            check_layers(remedy, plan_run(run, place_ranks(run, len(more.cards), more), other, more))
    else:
        assert host_gib == 512 or "offload__disk" in changes


def test_layers_that_need_not_be_streamed_ask_for_no_more_cards() -> None:
    small = {"offload": OffloadConfig(resident_layers=30), "limits": LimitsConfig(host_memory_gib=2)}
    found = remedies(refused(LLAMA_8B, cards_of(2), 2, **small))
    assert found == ["the run without offload.resident_layers"]
    assert plan(LLAMA_8B, cards_of(2), 2, **small | {"offload": OffloadConfig()}).offload is None


def test_sequences_are_shortened_by_the_keys_that_make_them_long() -> None:
    """engine.max_context may not be less than the workload needs."""
    changes = {"engine__max_context": 100_000, "workload__prompt_tokens": 90_000, "offload__enabled": OffloadKind.off}
    message = refused(LLAMA_8B, cards_of(1), **changes)
    assert re.search(r"\(workload.prompt_tokens \+ workload.output_tokens=(\d+) and engine.max_context=\1\)", message)
    message = refused(LLAMA_8B, cards_of(1), **changes | {"workload__prompt_tokens": 1000})
    assert re.search(r"tokens \(engine.max_context=\d+\)", message)


def test_layers_that_stay_are_made_fewer_where_their_number_was_asked_for() -> None:
    """offload.enabled=on would leave it as it is."""
    roomy = replace(cards_of(1), host_memory_bytes=512 * 2**30)
    message = refused(LLAMA_70B_AWQ, roomy, offload=OffloadConfig(resident_layers=60))
    most = int(re.findall(r"offload.resident_layers=(\d+)", message)[-1])
    assert "offload.enabled" not in message
    more = refused(LLAMA_70B_AWQ, roomy, offload=OffloadConfig(resident_layers=most + 1))
    kv = f"offload.kv=host, which keeps keys and values of {80 - most - 1} layers in host memory."
    assert more.endswith(f"offload.resident_layers={most}; or {kv}")


@pytest.mark.parametrize("is_described", [True, False])
@pytest.mark.parametrize(("peers", "num_cards"), [(PeerAccess.auto, 3), (PeerAccess.off, 2)])
def test_more_cards_are_counted_with_what_nvlink_between_them_takes(
    peers: PeerAccess, num_cards: int, is_described: bool
) -> None:
    """Half a GiB of a card more than through host memory, which these lack where they are two."""
    limits = LimitsConfig(card_memory_gib=68.3, peer_access=peers)
    linked = HardwareConfig(HardwareKind.facts, "linked", memory_gib=140, nvlink=True)
    changes = {"limits": limits, **({"hardware": linked} if is_described else {}), **RESIDENT}

    def cards(num: int) -> Inventory:
        found = cards_of(3, nvlink=((0, 1), (0, 2), (1, 2)), memory_bytes=140 * 2**30)
        return read_inventory(linked, num) if is_described else found

    message = refused(LLAMA_70B, cards(1), **changes)
    assert f"What would fit: gpus={num_cards}" in message
    assert plan(LLAMA_70B, cards(num_cards), num_cards, **changes).offload is None
