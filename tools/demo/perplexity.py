"""Perplexity of the demo model in every format that tools write, on text that it was not trained on.

    python -m tools.demo.perplexity results/perplexity_demo_202611.json

Weights are rounded to the nearest (tools/quantize_checkpoint); the products are in float32, so that what differs from
bf16 is the format alone. Rows more are of bf16 weights with keys and values in e4m3 (engine.kv_dtype=fp8), and of ranks
whose partial sums go in 8 bits (engine.all_reduce_bits=8).
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from launcher.models.shape import shape_from_checkpoint
from parallel.checkpoint.headers import read_checkpoint
from parallel.checkpoint.load import load_checkpoint
from parallel.communicator import Communicator
from parallel.engine.engine import Engine
from parallel.engine.limits import EngineLimits
from parallel.engine.sampling import gather_logits
from parallel.engine.sequence import Part, TokenSequence
from parallel.kernels.pages import pages_for
from parallel.partition import QUANT_GROUP
from parallel.shard import build_sharded_model
from parallel.transports.rounded import Rounded
from tools.checkpoint.quantization import WRITERS
from tools.demo.corpus import collect
from tools.demo.tokenizer import encode_stream
from tools.demo.training import CONTEXT, evaluate
from tools.local_ranks import run_on_ranks
from tools.quantize_checkpoint import GIB, quantize

DEMO = Path("launcher/models/demo")
PLAIN = "bf16"
KV_FP8 = "bf16, KV in fp8"
# By number of ranks.
INT8_SUMS = {ranks: f"bf16, {ranks} ranks, sums in 8 bits" for ranks in (2, 4)}
TIMEOUT_SEC = 1800.0
CPU = torch.device("cpu")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo.perplexity", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--tokens", type=int, default=65536, help="of held-out text (%(default)s)")
    args = parser.parse_args(argv)
    corpus = collect()
    with tempfile.TemporaryDirectory() as folder:
        rows = list(measure(write_all(DEMO, Path(folder)), held_out_tokens(DEMO, args.tokens)))
    result = {
        "perplexity": rows,
        "num_tokens": args.tokens,
        "corpus": corpus.facts(),
        "torch": torch.__version__,
        "commands": [f"python -m tools.demo.perplexity {args.out} --tokens {args.tokens}"],
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def write_all(model: Path, root: Path) -> dict[str, Path]:
    """The folder of `model` in each format, and, as it is, under the name PLAIN."""
    for name, writer in WRITERS.items():
        quantize(model, root / name, writer, 5 * GIB)
    return {PLAIN: model} | {name: root / name for name in WRITERS}


def held_out_tokens(model: Path, num_tokens: int) -> NDArray[np.int64]:
    """The first tokens of the held-out files of this Python's standard library, in the order of their paths."""
    _, texts = collect().split()
    stream = encode_stream(AutoTokenizer.from_pretrained(model), texts.values())
    if len(stream) < num_tokens:
        raise ValueError(f"--tokens {num_tokens}: the held-out text has {len(stream)}.")
    return stream[:num_tokens]


def measure(folders: dict[str, Path], stream: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """A row for each format: bits a weight of its linears as stored, perplexity, and its increase over PLAIN's."""
    losses = {
        name: run_on_ranks(mean_loss, 1, folder, stream, timeout_sec=TIMEOUT_SEC)[0] for name, folder in folders.items()
    }
    losses[KV_FP8] = run_on_ranks(mean_loss_with_fp8_kv, 1, folders[PLAIN], stream, timeout_sec=TIMEOUT_SEC)[0]
    for ranks, name in INT8_SUMS.items():
        found = run_on_ranks(mean_loss_with_int8_sums, ranks, folders[PLAIN], stream, timeout_sec=TIMEOUT_SEC)
        losses[name] = found[0]
    for name in losses:
        yield {
            "format": name,
            "linear_bits": round(shape_from_checkpoint(folders.get(name, folders[PLAIN])).linear_bits, 3),
            "perplexity": round(math.exp(losses[name]), 4),
            "increase": round(math.exp(losses[name] - losses[PLAIN]) - 1, 6),
        }


def mean_loss(communicator: Communicator, folder: Path, stream: NDArray[np.int64]) -> float:
    """Nats a token, on one rank."""
    return evaluate(load(communicator, folder), stream, CONTEXT, batch=4)


def mean_loss_with_fp8_kv(communicator: Communicator, folder: Path, stream: NDArray[np.int64]) -> float:
    return mean_loss_of_engine(communicator, folder, stream, torch.float8_e4m3fn)


def mean_loss_with_int8_sums(communicator: Communicator, folder: Path, stream: NDArray[np.int64]) -> float:
    return mean_loss_of_engine(Rounded(communicator), folder, stream, None)


def mean_loss_of_engine(
    communicator: Communicator, folder: Path, stream: NDArray[np.int64], kv_dtype: torch.dtype | None
) -> float:
    limits = EngineLimits(max_context=CONTEXT, batch_size=1, prefill_chunk=CONTEXT)
    engine = Engine(load(communicator, folder), communicator, limits, kv_dtype=kv_dtype)
    return evaluate(EngineModel(engine), stream, CONTEXT, batch=1)


def load(communicator: Communicator, folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    model = build_sharded_model(config, communicator, dtype=torch.float32, grain=QUANT_GROUP)
    load_checkpoint(model, read_checkpoint(folder), CPU)
    return model.module


@dataclass(frozen=True)
class EngineModel:
    """An engine in the manner of a transformers model: one prompt [1, tokens] in, the logits after each token out."""

    engine: Engine
    device: torch.device = CPU

    @torch.inference_mode()
    def __call__(self, ids: Tensor, *, use_cache: bool) -> CausalLMOutput:
        sequence = TokenSequence(0, ids[0].tolist(), max_tokens=1)
        sequence.pages = self.engine.pages.allocate(pages_for(sequence.num_tokens))
        hidden = self.engine.hidden_states([Part(sequence, 0, len(sequence.prompt))])
        self.engine.pages.release(sequence.pages)
        logits = self.engine.decoder.logits(hidden)
        return CausalLMOutput(logits=gather_logits(logits, self.engine.sampler.shards, self.engine.communicator)[None])


if __name__ == "__main__":
    main()
