"""Train the demo model that this repository carries: a small Llama on the Python standard library's sources.

Every machine can then run the main job, and every test has weights with structure in them: with random weights a wrong
shard, scale or rounding changes noise into other noise, with trained ones it changes the loss. How much the model
learned is stated beside a smoothed trigram on the same tokens.

    python -m tools.make_demo_model --minutes 4
"""

import argparse
import json
import math
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.demo.card import model_card
from tools.demo.corpus import Corpus, collect, is_held_out, unpack
from tools.demo.ngram import fit_trigram
from tools.demo.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, encode_stream, train_tokenizer
from tools.demo.training import CONTEXT, TrainingPlan, TrainingResult, demo_config, evaluate, train

# Dozens of epochs over 8 M tokens overfit. Of two runs of 1.8 minutes on an H200 (4000 to 4400 steps of 64 x 1024
# tokens, rate 2e-3), decay 0.3 came down to 1.866 nats per held-out token and 1.0 to 1.778, after 2500 steps.
WEIGHT_DECAY = 1.0
# Where a file is read or written is a fact about one machine, not about the model.
PATH_OPTIONS = ("out", "corpus")
# What has no meaning below; a text is scored from its third token on.
LEAST = {"max_files": 1, "max_held_out_tokens": 3, "steps": 1, "batch": 1}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line; the defaults are those of the model in launcher/models/demo."""
    parser = argparse.ArgumentParser(prog="python -m tools.make_demo_model", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("launcher/models/demo"), help="folder to write (%(default)s)")
    add("--corpus", type=Path, help="packed by python -m tools.demo.corpus; default: this Python's standard library")
    add("--max-files", type=int, help="use only the first so many files")
    add("--max-held-out-tokens", type=int, help="score only the first so many held-out tokens")
    add("--steps", type=int, help="optimizer steps")
    add("--minutes", type=float, help="wall-clock budget of the training loop; with --steps, what comes first ends it")
    add("--batch", type=int, default=64, help="sequences a step (%(default)s)")
    add("--sequence", type=int, default=CONTEXT, help="tokens a sequence (%(default)s)")
    add("--lr", type=float, default=2e-3, help="peak learning rate (%(default)s)")
    add("--weight-decay", type=float, default=WEIGHT_DECAY, help="AdamW's, on matrices (%(default)s)")
    add("--seed", type=int, default=0, help="of the initial weights and of the batches (%(default)s)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    args = parser.parse_args(argv)
    if args.steps is None and args.minutes is None:
        parser.error("neither --steps nor --minutes says when to stop: give one, e.g. --minutes 4")
    for name, least in LEAST.items():
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if args.minutes is not None and not args.minutes > 0:
        parser.error(f"--minutes {args.minutes:g} must be above 0")
    if not 1 < args.sequence <= CONTEXT:
        parser.error(f"--sequence {args.sequence} is outside 2..{CONTEXT}, the positions the model has")
    return args


def main(argv: list[str] | None = None) -> None:
    """Corpus -> tokenizer -> trigram -> training -> bf16 folder -> its score, each step with a line on stdout."""
    args = parse_arguments(argv)
    device = torch.device(_device_name(args.device))
    try:
        corpus = read_corpus(args)
        train_texts, held_out_texts = corpus.split()
        tokenizer = train_tokenizer(train_texts.values(), CONTEXT)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    stream = encode_stream(tokenizer, train_texts.values())
    held_out = encode_stream(tokenizer, held_out_texts.values())[: args.max_held_out_tokens]
    print(f"tokens: {len(stream)} to train on, {len(held_out)} held out", flush=True)
    trigram_loss = fit_trigram(stream, VOCAB_SIZE).loss(held_out)
    print(f"trigram: {trigram_loss:.4f} nats per token", flush=True)

    plan = TrainingPlan(args.steps, args.minutes, args.batch, args.sequence, args.lr, args.weight_decay, args.seed)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(demo_config()).to(device)
    result = train(model, stream, held_out, plan)
    write_model(model, tokenizer, args.out)

    loss = evaluate(LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(device), held_out, args.sequence)
    print(f"held-out, as saved: {loss:.4f} nats per token (trigram {trigram_loss:.4f})", flush=True)
    text_bytes = len(tokenizer.decode(held_out[2:].tolist(), skip_special_tokens=True).encode())
    facts = {
        "model": _scores(loss, len(held_out) - 2, text_bytes),
        "trigram": _scores(trigram_loss, len(held_out) - 2, text_bytes)
        | {"smoothing": "interpolated modified Kneser-Ney"},
        "held_out": {"num_tokens": len(held_out) - 2, "num_bytes": text_bytes, "window": args.sequence},
        "num_parameters": model.num_parameters(),
        "training": _training_facts(plan, result, len(stream)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "versions": _versions(),
        "corpus": corpus.facts(),
        "command": _command(args),
    }
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (args.out / "README.md").write_text(model_card(facts), encoding="utf-8")


def read_corpus(args: argparse.Namespace) -> Corpus:
    """Raises ValueError: it has no text, or none to score the model on."""
    corpus = (unpack(args.corpus) if args.corpus else collect()).first(args.max_files)
    if not any(map(is_held_out, corpus.texts)):
        raise ValueError(f"none of the {len(corpus.texts)} files is held out; raise --max-files")
    print(f"corpus: {corpus.facts()}", flush=True)
    return corpus


def write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the bf16 weights, configuration and tokenizer as one folder that transformers' Auto classes load."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _device_name(choice: str) -> str:
    if choice != "auto":
        return choice
    return "cuda" if torch.cuda.is_available() else "cpu"


def _scores(loss: float, num_tokens: int, num_bytes: int) -> dict[str, Any]:
    """One loss in its three usual units. In bits per byte, BOS and EOS add to the loss and not to the bytes."""
    return {
        "nats_per_token": round(loss, 4),
        "bits_per_byte": round(loss * num_tokens / math.log(2) / num_bytes, 4),
        "perplexity": round(math.exp(loss), 3),
    }


def _training_facts(plan: TrainingPlan, result: TrainingResult, num_train_tokens: int) -> dict[str, Any]:
    tokens_seen = result.steps * plan.batch * plan.sequence
    return {
        **{name: value for name, value in asdict(plan).items() if value is not None},
        "steps": result.steps,
        "best_step": result.best_step,
        "num_train_tokens": num_train_tokens,
        "num_tokens_seen": tokens_seen,
        "epochs": round(tokens_seen / num_train_tokens, 2),
        "seconds": round(result.seconds, 1),
        "compiled": result.compiled,
        "held_out_history": [[step, round(loss, 4)] for step, loss in result.history],
    }


def _versions() -> dict[str, str]:
    modules = {"torch": torch, "transformers": transformers, "tokenizers": tokenizers, "numpy": np}
    return {"python": platform.python_version()} | {name: module.__version__ for name, module in modules.items()}


def _command(args: argparse.Namespace) -> str:
    given = {name: value for name, value in vars(args).items() if name not in PATH_OPTIONS and value is not None}
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
    return f"python -m tools.make_demo_model {options}"


if __name__ == "__main__":
    main()
