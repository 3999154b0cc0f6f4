"""A model in place, as tasks run it: loaded, with an engine for the workload of the run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from launcher.config import KVDType, SamplingConfig, SpeculationConfig, SpeculationKind
from launcher.plan.plan import Plan
from launcher.plan.prefill import hides_sums
from launcher.rank.context import RankContext
from launcher.tasks.fused_rows import choose_fused_rows
from launcher.tasks.host_layers import open_host_layers
from launcher.tasks.measure import kernels, memory
from launcher.tasks.tokens import eos_token_ids, text_tokenizer
from launcher.tasks.weights import load_draft_model, load_sharded_model
from parallel.checkpoint.load import LoadResult
from parallel.engine.answer import StopRules
from parallel.engine.engine import Engine
from parallel.engine.limits import EngineLimits
from parallel.engine.sampling import SamplingParams
from parallel.engine.speculation.speculator import Speculation
from parallel.engine.speculation.tune import PlanCosts, tune
from parallel.offload.host_layers import HostLayers
from parallel.product_trial import FusedRows


@dataclass(frozen=True)
class LoadedModel:
    """An engine over a loaded model, with what turns its tokens into text."""

    engine: Engine
    tokenizer: Tokenizer
    rules: StopRules
    load: LoadResult
    draft_load: LoadResult | None
    # None where linears have no choice.
    fused_rows: FusedRows | None
    # Of trees that are chosen step by step; None without.
    tree_costs: PlanCosts | None = None

    def results(self, context: RankContext) -> dict[str, Any]:
        """What every run of a model reports of how it was loaded, and by what it computes."""
        return {
            "transport": context.transport_summary(),
            "load": asdict(self.load),
            "fused_rows": None if self.fused_rows is None else asdict(self.fused_rows),
            "kernels": kernels(self.engine),
            "startup": context.startup,
            "memory": memory(context.device, self.engine),
        }


def load_model(context: RankContext, plan: Plan, tokenizer: PreTrainedTokenizerFast | None) -> LoadedModel:
    run = context.job.run
    # Read from a file, which may be broken: told before the weights are loaded.
    eos_ids = eos_token_ids(context.job, tokenizer)
    host_layers = None if plan.offload is None else open_host_layers(context, plan.offload)
    fused_rows = choose_fused_rows(context)
    module, load = load_sharded_model(context, fused_rows, host_layers)
    draft = load_draft_model(context, fused_rows)
    speculation = speculation_params(run.speculation, None if draft is None else draft[0])
    engine = open_engine(context, plan, module, speculation, host_layers)
    context.reached("loaded")
    rules = StopRules(
        max_tokens=run.workload.output_tokens,
        eos_ids=eos_ids,
        texts=tuple(run.sampling.stop),
    )
    draft_load = None if draft is None else draft[1]
    return LoadedModel(engine, text_tokenizer(tokenizer), rules, load, draft_load, fused_rows, tune(engine))


def open_engine(
    context: RankContext,
    plan: Plan,
    module: PreTrainedModel,
    speculation: Speculation | None = None,
    host_layers: HostLayers | None = None,
) -> Engine:
    """An engine for the run's workload, as planned, over a model that was loaded."""
    run = context.job.run
    return Engine(
        module,
        context.communicator,
        EngineLimits(
            plan.max_context,
            run.workload.batch_size,
            run.engine.prefill_chunk,
            plan.prefill_chunk_while_decoding,
            run.num_ahead,
            plan.captured_passes,
            hides_sums(run, over_nvlink=context.job.placement.over_nvlink),
        ),
        sampling=sampling_params(run.sampling),
        kv_dtype=torch.float8_e4m3fn if run.engine.kv_dtype == KVDType.fp8 else None,
        prefix_cache=run.engine.prefix_cache,
        speculation=speculation,
        host_layers=host_layers,
    )


def sampling_params(sampling: SamplingConfig) -> SamplingParams:
    return SamplingParams(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed)


def speculation_params(config: SpeculationConfig, draft: PreTrainedModel | None) -> Speculation | None:
    if config.kind == SpeculationKind.none:
        return None
    ngrams = (config.ngram_max, config.ngram_min)
    return Speculation(config.kind.value, config.chain, *ngrams, draft, config.tree, config.choices)
