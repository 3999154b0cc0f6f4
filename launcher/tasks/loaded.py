"""A model in place, as tasks run it."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer

from parallel.checkpoint.load import LoadResult
from parallel.engine.engine import Engine
from parallel.engine.generate import StopRules
from parallel.engine.speculation.tune import PlanCosts
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
