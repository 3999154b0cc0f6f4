"""A plan for reading: lines of text and tables. Everything in them is predicted and says so."""

from __future__ import annotations

from rich.table import Table

from launcher.amounts import amount, number
from launcher.models.shape import ModelShape
from launcher.plan.offload import OffloadPlan
from launcher.plan.plan import Plan
from launcher.timing.predict import Times
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.units import GIB, KIB, MIB

# What carries messages between cards is timed when ranks start, size by size.
TRANSPORTS = {"nccl": "nccl; pinned host memory for sizes at which it is faster, unless engine.transport=nccl"}


def describe(plan: Plan, shape: ModelShape, times: Times | str) -> list[tuple[str, str]]:
    """(label, value) pairs; labels of numbers that a run would measure end in "predicted"."""
    weights = shape.quantization if shape.quantization != "none" else plan.dtype
    if shape.quantization in QUANTIZE_SCHEMES and shape.scheme == QUANTIZE_SCHEMES[shape.quantization]:
        weights += ", rounded while they load"
    return [
        ("model", f"{shape.num_layers} layers of {shape.hidden_size}, weights in {weights} (from {shape.source})"),
        ("ranks", f"{plan.placement.world_size} on {plan.placement.device}"),
        ("topology", f"{plan.placement.topology}: {plan.placement.topology_reason}"),
        ("transport", TRANSPORTS.get(plan.placement.transport, plan.placement.transport)),
        ("context", f"{plan.max_context:,} tokens x batch of {plan.batch_size}: {plan.max_context_reason}"),
        *([] if plan.offload is None else [("streamed layers, predicted", streamed_text(plan.offload))]),
        *([] if plan.offload is None else describe_disk(plan.offload)),
        *([] if plan.offload is None else describe_kv(plan.offload)),
        *([] if plan.offload is None else describe_host(plan.offload)),
        ("KV cache a token, predicted", f"{plan.kv_bytes_per_token / KIB:.4g} KiB on the fullest rank"),
        ("KV tokens that fit, predicted", f"{plan.kv_tokens_that_fit:,}"),
        *describe_chunk(plan),
        *describe_passes(plan),
        *describe_times(plan, times),
    ]


def describe_chunk(plan: Plan) -> list[tuple[str, str]]:
    """How prompts are read beside answers, and what these wait for it, where that is known."""
    tokens = plan.prefill_chunk_while_decoding
    if tokens is None or plan.longest_wait_ms is None:
        return []
    wait = f"{tokens:,} tokens a pass; a token waits up to {number(plan.longest_wait_ms)} ms for one, its step included"
    return [("prompts beside answers, predicted", wait)]


def describe_passes(plan: Plan) -> list[tuple[str, str]]:
    """That passes of prompts are not captured for want of memory, where they would be."""
    if not plan.captured_passes_left_out:
        return []
    return [
        ("graphs of prompts", "none, since they do not fit (engine.prefill_graphs=auto): first tokens may be slower")
    ]


def describe_times(plan: Plan, times: Times | str) -> list[tuple[str, str]]:
    """The workload's times with what holds them and what they rest on, or why there are none."""
    if not isinstance(times, Times):
        least = [] if plan.tpot_floor_ms is None else [("time a token, predicted", floor_text(plan.tpot_floor_ms))]
        return [*least, ("times, predicted", f"none: {times}.")]
    token = f"{number(times.tpot_ms)} ms at batch {plan.batch_size}"
    token += "" if plan.tpot_floor_ms is None else f"; {floor_text(plan.tpot_floor_ms)}"
    talk = f"; communication is {times.comm_share:.0%} of it" if plan.placement.world_size > 1 else ""
    energy = "" if times.tokens_per_joule is None else f", {number(times.tokens_per_joule)} a joule"
    return [
        ("time to first token, predicted", f"{number(times.ttft_ms)} ms"),
        ("time a token, predicted", token),
        ("held by, predicted", times.limit + talk),
        ("output, predicted", f"{number(times.tokens_per_sec)} tokens/s{energy}, prefill included"),
        ("predicted from", "; ".join((times.source, *times.assumptions)) + "."),
    ]


def floor_text(floor_ms: float) -> str:
    return f"{number(floor_ms)} ms or more for its bytes"


def streamed_text(offload: OffloadPlan) -> str:
    num_streamed, gib = len(offload.streamed_layers), sum(offload.host_bytes) / GIB
    num_layers = num_streamed + offload.resident_layers + len(offload.disk_layers)
    text = f"{num_streamed} of {num_layers}, {gib:.2f} GiB of host memory with the embedding"
    if offload.pass_ms is not None and num_streamed:
        rate = min(rate for rate in offload.copy_gb_per_sec if rate is not None)
        text += f", {number(max(offload.pass_bytes) / 1e9)} GB a pass at {number(rate)} GB/s"
    if offload.host_may_compute:
        text += ", less in steps where the host is fast enough to compute some of them"
    return f"{text}: {offload.reason}"


def describe_kv(offload: OffloadPlan) -> list[tuple[str, str]]:
    """Keys and values in host memory, where some are there."""
    if not any(offload.kv_host_bytes):
        return []
    gib, kib = sum(offload.kv_host_bytes) / GIB, max(offload.kv_bytes_per_token) / KIB
    text = f"{gib:.2f} GiB, of {len(offload.streamed_layers)} layers; a pass brings {kib:.4g} KiB a token it attends to"
    text += f", {number(offload.kv_token_ms * 1e3)} ms a thousand of them" if offload.kv_token_ms else ""
    return [("KV in host memory, predicted", text)]


def describe_host(offload: OffloadPlan) -> list[tuple[str, str]]:
    """What ranks need there beside their cards, where it is known what there is."""
    if offload.free_host_bytes is None:
        return []
    needed, free = offload.needed_host_bytes / GIB, offload.free_host_bytes / GIB
    return [("host memory, predicted", f"{needed:.2f} GiB of {free:.2f} with the processes of the ranks")]


def describe_disk(offload: OffloadPlan) -> list[tuple[str, str]]:
    """Layers from the disk, where there are some, and what a pass waits for at least."""
    if offload.disk_rate is None or offload.disk_ms is None:
        return []
    read, ring, rate = sum(offload.disk_bytes) / 1e9, sum(offload.ring_bytes) / GIB, offload.disk_rate
    text = f"{len(offload.disk_layers)}, {number(read)} GB a pass as the checkpoint has it, {ring:.2f} GiB of host"
    text += f" memory to read ahead; {number(offload.disk_ms)} ms at {number(rate.gb_per_sec)} GB/s ({rate.source})"
    if offload.pack_ms:
        text += f"; packing them meanwhile {number(offload.pack_ms)} ms, estimated by bytes and instructions"
    return [("layers from the disk, predicted", text)]


def plan_tables(plan: Plan, shape: ModelShape, times: Times | str) -> tuple[Table, Table]:
    """What was decided, and the memory of each rank."""
    decided = Table(title="Plan", show_header=False)
    for row in describe(plan, shape, times):
        decided.add_row(*row)
    return decided, plan_table(plan)


def plan_table(plan: Plan) -> Table:
    """Memory of each rank, line by line, in GiB."""
    names = ", ".join(dict.fromkeys(card.name for card in plan.cards))
    unit, unit_bytes = memory_unit(max(card.predicted_bytes for card in plan.cards))
    table = Table(title=f"Memory in {unit}, predicted ({names})")
    table.add_column("", no_wrap=True)
    for card in plan.cards:
        where = "CPU" if card.card is None else f"card {card.card}"
        table.add_column(f"rank {card.rank}\n{where}", justify="right")
    lines = list(dict.fromkeys(name for card in plan.cards for name in card.lines))
    for name in lines:
        table.add_row(
            name, *(amount(card.lines.get(name, 0), unit_bytes) for card in plan.cards), end_section=name == lines[-1]
        )
    table.add_row("all, predicted", *(amount(card.predicted_bytes, unit_bytes) for card in plan.cards))
    table.add_row("budget", *(amount(card.budget_bytes, unit_bytes) for card in plan.cards))
    table.add_row(
        "left, predicted", *(amount(card.budget_bytes - card.predicted_bytes, unit_bytes) for card in plan.cards)
    )
    return table


def memory_unit(largest_bytes: int) -> tuple[str, int]:
    """Name and size of the unit in which sizes up to `largest_bytes` read well with two decimals."""
    return ("GiB", GIB) if largest_bytes >= 2 * GIB else ("MiB", MIB)
