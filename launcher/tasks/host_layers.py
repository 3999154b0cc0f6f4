"""The layers of a run that lie in host memory, and which of them the host computes in decode steps: by a trial."""

from __future__ import annotations

import torch

from launcher.plan.offload import OffloadPlan
from launcher.rank.context import RankContext
from launcher.tasks.copy_rates import copy_bandwidth
from parallel.footprint import host_refusal
from parallel.kernels import host_int4
from parallel.offload.disk_layers import DiskLayers
from parallel.offload.exchange import MAX_BYTES
from parallel.offload.host_layers import NOTHING_SHARED, HostLayers, SharedLayers
from parallel.offload.host_trial import GROUP_SIZE, HostRates, HostTrial, Shape
from parallel.offload.split import PassCosts, choose_num_on_host, spread_on_host
from parallel.partition import split_by_grain, split_by_heads

BF16_BYTES = 2


def open_host_layers(context: RankContext, offload: OffloadPlan) -> HostLayers:
    """Raises RuntimeError: memory for the trial cannot be pinned."""
    offloaded = offload.streamed_layers
    disk = DiskLayers(offload.disk_layers, context.device) if offload.disk_layers else None
    with_kv = any(offload.kv_host_bytes)
    return HostLayers(offloaded, context.device, share_layers(context, offloaded), disk, with_kv=with_kv)


def share_layers(context: RankContext, offloaded: tuple[int, ...]) -> SharedLayers:
    wanted, num_rows = context.job.run.offload.host_layers, rows_of_step(context)
    if wanted == 0 or not offloaded or not can_share(context, num_rows):
        return NOTHING_SHARED
    num_threads = max(1, context.job.host_cores // context.communicator.world_size)
    if wanted is not None:
        torch.set_num_threads(num_threads)
        return SharedLayers(spread_on_host(offloaded, min(wanted, len(offloaded))), num_rows)
    rates = try_host(context, num_rows, num_threads)
    torch.set_num_threads(rates.num_threads)
    number = choose_number(context, rates, len(offloaded))
    return SharedLayers(spread_on_host(offloaded, number), num_rows, rates)


def rows_of_step(context: RankContext) -> int:
    run = context.job.run
    return run.workload.batch_size * run.speculation.rows_per_sequence


def can_share(context: RankContext, num_rows: int) -> bool:
    """Whether the host can multiply by the model's linears, and rows of such a step can be sent to it."""
    shape, plan = context.job.shape, context.job.plan
    assert shape is not None
    assert plan is not None
    if context.device.type == "cpu" or shape.scheme is None or host_refusal(shape.scheme, plan.dtype) is not None:
        return False
    shapes = linear_shapes(context)
    if any(num_out % max(host_int4.OUTPUTS_PER_BLOCK) or num_in % GROUP_SIZE for num_out, num_in in shapes):
        return False
    widest = max(max(linear) for linear in shapes)
    return num_rows * widest * BF16_BYTES <= MAX_BYTES and host_int4.layout_problem() is None


def linear_shapes(context: RankContext) -> list[Shape]:
    """[out, in] of this rank's linears of a layer: q, k and v, o, gate and up, down; those it has a part in."""
    shape, plan, world_size = context.job.shape, context.job.plan, context.communicator.world_size
    assert shape is not None
    assert plan is not None
    heads, kv_heads = (
        split_by_heads(number, world_size, shape.num_kv_heads)[context.rank] * shape.head_dim
        for number in (shape.num_heads, shape.num_kv_heads)
    )
    inner = split_by_grain(shape.intermediate_size, world_size, plan.grain)[context.rank]
    width = shape.hidden_size
    found = [(heads + 2 * kv_heads, width), (width, heads), (2 * inner, width), (width, inner)]
    return [linear for linear in found if min(linear) > 0]


def try_host(context: RankContext, num_rows: int, num_threads: int) -> HostRates:
    """With all cores and with half of them, since on many hosts two are one; the faster. All ranks at once."""
    trial = HostTrial(linear_shapes(context), context.device)
    found = []
    for number in sorted({num_threads, max(1, num_threads // 2)}):
        context.communicator.barrier()
        found.append(trial.measure(num_rows, number))
    return min(found, key=lambda rates: rates.layer_sec)


def choose_number(context: RankContext, rates: HostRates, num_offloaded: int) -> int:
    """Of layers on the host; the least that any rank would choose, on all of them."""
    shape, card = context.job.shape, copy_bandwidth(context.device)
    assert shape is not None
    assert card is not None
    size = rates.layer_bytes
    costs = PassCosts(
        num_layers=shape.num_layers,
        num_offloaded=num_offloaded,
        host_sec=rates.layer_sec,
        copy_sec=size / rates.link,
        copy_alone_sec=size / rates.link_alone,
        card_sec=size / card,
    )
    number = torch.tensor([choose_num_on_host(costs)], device=context.device, dtype=torch.float32)
    return int(context.communicator.all_gather(number).min())
