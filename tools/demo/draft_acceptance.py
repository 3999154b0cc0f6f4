"""How many drafts of the demo model come true: chains and trees, by a smaller model and by looking up.

    python -m tools.demo.draft_acceptance results/speculation_demo_202611.json

The smaller model has the first layers of the demo model, trained on with its text for a minute; it is made anew each
time. Prompts are of held-out text. Answers must be those without drafts, or nothing is written.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from parallel.communicator import Communicator
from parallel.engine.answer import StopRules
from parallel.engine.engine import Engine
from parallel.engine.generate import Prompt, Result, generate
from parallel.engine.limits import EngineLimits
from parallel.engine.sampling import SamplingParams
from parallel.engine.speculation.speculator import Speculation
from parallel.engine.speculation.tree_plan import TreePlan
from tools.demo.corpus import collect
from tools.demo.perplexity import DEMO, TIMEOUT_SEC, held_out_tokens, load
from tools.demo.tokenizer import encode_stream
from tools.demo.training import TrainingPlan, train
from tools.local_ranks import run_on_ranks
from tools.make_demo_model import write_model

NUM_LAYERS = 3
PLAN = TrainingPlan(steps=120, minutes=None, batch=8, sequence=128, lr=5e-4, weight_decay=0.1, seed=0)
NUM_SCORED = 1024
NUM_PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS, BATCH = 16, 128, 64, 8
TEMPERATURES = (0.0, 0.8)
SETTINGS = (
    Speculation("draft", num_drafts=4),
    Speculation("draft", tree=TreePlan(4, 3, 2)),
    Speculation("draft", tree=TreePlan(16, 6, 6)),
    Speculation("draft", tree=TreePlan(64, 6, 6)),
    Speculation("draft", tree=TreePlan(64, 8, 8)),
    Speculation("ngram", num_drafts=4),
    Speculation("ngram", tree=TreePlan(16, 6, 1)),
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo.draft_acceptance", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        loss = make_draft(Path(folder))
        rows = run_on_ranks(measure_all, 1, Path(folder), timeout_sec=TIMEOUT_SEC)[0]
    result = {
        "acceptance": rows,
        "draft": {"num_layers": NUM_LAYERS, "nats_per_token": round(loss, 4), "training": asdict(PLAN)},
        "workload": {"prompts": NUM_PROMPTS, "prompt_tokens": PROMPT_TOKENS, "answer_tokens": ANSWER_TOKENS},
        "corpus": collect().facts(),
        "torch": torch.__version__,
        "commands": [f"python -m tools.demo.draft_acceptance {args.out}"],
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def make_draft(folder: Path) -> float:
    """Writes the smaller model; returns its loss on held-out text, in nats a token."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = LlamaForCausalLM.from_pretrained(DEMO, dtype=torch.float32, num_hidden_layers=NUM_LAYERS)
    texts, _ = collect().split()
    result = train(model, encode_stream(tokenizer, texts.values()), held_out_tokens(DEMO, NUM_SCORED), PLAN)
    write_model(model, tokenizer, folder)
    return min(score for _, score in result.history)


@dataclass(frozen=True)
class Run:
    """An engine over the demo model on one rank, with drafts or without."""

    communicator: Communicator
    draft: Path
    temperature: float

    def answer(self, speculation: Speculation | None) -> Result:
        if speculation is not None and speculation.kind == "draft":
            speculation = replace(speculation, draft=load(self.communicator, self.draft))
        engine = Engine(
            load(self.communicator, DEMO),
            self.communicator,
            EngineLimits(PROMPT_TOKENS + ANSWER_TOKENS, BATCH, PROMPT_TOKENS),
            sampling=SamplingParams(self.temperature),
            speculation=speculation,
        )
        tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
        return generate(engine, list(prompts()), tokenizer, StopRules(ANSWER_TOKENS))


def prompts() -> Iterator[Prompt]:
    tokens = held_out_tokens(DEMO, NUM_PROMPTS * 4 * PROMPT_TOKENS)
    for index in range(NUM_PROMPTS):
        start = index * 4 * PROMPT_TOKENS
        yield Prompt(index, tokens[start : start + PROMPT_TOKENS].tolist())


def measure_all(communicator: Communicator, draft: Path) -> list[dict[str, Any]]:
    return [row for temperature in TEMPERATURES for row in measure(Run(communicator, draft, temperature))]


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """A row for each setting.

    Raises:
        RuntimeError: drafts changed an answer.
    """
    plain = [answer.token_ids for answer in run.answer(None).answers]
    for setting in SETTINGS:
        result = run.answer(setting)
        if [answer.token_ids for answer in result.answers] != plain:
            raise RuntimeError(f"{setting} changed answers at temperature {run.temperature}.")
        acceptance, tree = result.acceptance, setting.tree
        passes = acceptance.lengths.total()
        row = {
            "temperature": run.temperature,
            "kind": setting.kind,
            "tree": None if tree is None else asdict(tree),
            "rows": 1 + setting.num_drafts if tree is None else tree.size,
            "drafted_per_pass": round(acceptance.drafted / passes, 3),
            "tokens_per_pass": round(1 + acceptance.accepted / passes, 3),
            "passes": passes,
            "histogram": acceptance.histogram(setting.num_drafts if tree is None else tree.depth),
        }
        print(json.dumps(row), flush=True)
        yield row


if __name__ == "__main__":
    main()
