"""Write a synthetic dense checkpoint: random weights of a real model's shape, for timing loads and decode steps.

Files are written piece by piece from one small block of random numbers, so that memory stays small and the disk sets
the pace. The text such a model makes is noise.

    python -m tools.make_checkpoint --preset 8b --out /dev/shm/random-8b
    python -m tools.make_checkpoint --preset 70b --quantization awq --out /dev/shm/random-70b-awq
"""

import argparse
import json
import math
import os
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from parallel.units import GIB
from tools.checkpoint.fills import Fills
from tools.checkpoint.quantization import WRITERS, quantized_tensors
from tools.checkpoint.stored import Shard, Tensor, folder_problem, make_header, plan_shards, write_index

# Each family, and what makes all its layers attend to everything, as the engine does.
FULL_ATTENTION: dict[str, dict[str, None]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"sliding_window": None},
    "qwen3": {"sliding_window": None},
}
# torch and safetensors names of each dtype.
DTYPES = {
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
    "float32": (torch.float32, "F32"),
}
SIZE_NAMES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}
# Shapes of Llama 3.2 1B, 3.1 8B and 3.3 70B. `tiny` takes the demo tokenizer's vocabulary.
PRESETS = {
    "tiny": (64, 192, 2, 4, 2, 16, 4096, 2048),
    "1b": (2048, 8192, 16, 32, 8, 64, 128256, 131072),
    "8b": (4096, 14336, 32, 32, 8, 128, 128256, 131072),
    "70b": (8192, 28672, 80, 64, 8, 128, 128256, 131072),
}
TOKENIZER = Path("launcher/models/demo")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.make_checkpoint", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write; must be empty or new")
    add("--preset", choices=PRESETS, default="tiny", help="sizes to start from (%(default)s)")
    add("--model-type", choices=FULL_ATTENTION, default="llama", help="(%(default)s)")
    for name in SIZE_NAMES:
        add(f"--{name.replace('_', '-')}", type=int, help="instead of the preset's")
    add("--tied", action="store_true", help="the head is the embedding")
    add("--dtype", choices=DTYPES, default="bfloat16", help="(%(default)s)")
    add("--quantization", choices=WRITERS, help="how the layers' linears are stored (as numbers of --dtype)")
    add("--shard-gib", type=float, default=5.0, help="largest file, unless one tensor is larger (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="files written at once (%(default)s)")
    add("--tokenizer", type=Path, default=TOKENIZER, help="folder of the tokenizer to copy (%(default)s)")
    args = parser.parse_args(argv)
    for name in SIZE_NAMES:
        size = getattr(args, name)
        if size is not None and size < 1:
            parser.error(f"--{name.replace('_', '-')} {size} must be at least 1")
    if not args.tokenizer.is_dir():
        parser.error(f"--tokenizer {args.tokenizer} is no folder")
    if args.shard_gib <= 0 or args.workers < 1:
        parser.error("--shard-gib must be above 0 and --workers at least 1")
    if problem := folder_problem(args.out):
        parser.error(f"--out {problem}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Config -> names and shapes from transformers -> files -> index; prints what it wrote and how fast."""
    args = parse_arguments(argv)
    config = make_config(args)
    shards = plan_shards(list_tensors(config, args.dtype, args.quantization), round(args.shard_gib * GIB))
    num_bytes = sum(shard.num_bytes for shard in shards)
    args.out.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(args.out).free
    if free_bytes < num_bytes:
        raise SystemExit(f"{args.out} has {free_bytes / GIB:.1f} GiB free, the checkpoint takes {num_bytes / GIB:.1f}.")
    start = time.perf_counter()
    write_shards(shards, args.out, args.quantization, args.seed, args.workers)
    sec = time.perf_counter() - start
    if args.quantization is not None:
        config.quantization_config = WRITERS[args.quantization].config
    config.save_pretrained(args.out)
    write_index(shards, args.out)
    copy_tokenizer(args.tokenizer, args.out, config.vocab_size)
    speed = f"{sec:.1f} s, {num_bytes / 1e9 / sec:.2f} GB/s"
    print(f"{args.out}: {num_bytes / 1e9:.2f} GB in {len(shards)} files, {speed}")


def make_config(args: argparse.Namespace) -> PretrainedConfig:
    """The model's config in transformers' own class.

    Raises:
        SystemExit: heads do not divide.
    """
    sizes = dict(zip(SIZE_NAMES, PRESETS[args.preset], strict=True))
    sizes |= {name: getattr(args, name) for name in SIZE_NAMES if getattr(args, name) is not None}
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        raise SystemExit(
            f"--num-heads {sizes['num_heads']} must be a multiple of --num-kv-heads {sizes['num_kv_heads']}"
        )
    config = AutoConfig.for_model(
        args.model_type,
        **{theirs: sizes[ours] for ours, theirs in SIZE_NAMES.items()},
        tie_word_embeddings=args.tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        **FULL_ATTENTION[args.model_type],
        **read_token_ids(args.tokenizer),
    )
    config.dtype = DTYPES[args.dtype][0]
    return config


def read_token_ids(tokenizer: Path) -> dict[str, int]:
    """Ids that begin, end and pad a text, as the tokenizer's generation_config.json has them."""
    file = tokenizer / "generation_config.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    return {name: known[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in known}


def list_tensors(config: PretrainedConfig, dtype: str, quantization: str | None) -> list[Tensor]:
    """What a checkpoint of the model holds, in the model's order; nothing is allocated. Sets config.architectures.

    Raises:
        SystemExit: the format cannot store its linears.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    # A tied head appears once, under the embedding's name.
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    if quantization is None:
        return [Tensor(name, DTYPES[dtype][1], shape) for name, shape in shapes.items()]
    writer = WRITERS[quantization]
    try:
        return [t for name, shape in shapes.items() for t in quantized_tensors(name, DTYPES[dtype][1], shape, writer)]
    except ValueError as error:
        raise SystemExit(str(error)) from None


def write_shards(shards: list[Shard], out: Path, quantization: str | None, seed: int, workers: int) -> None:
    """Writes all files; the bytes depend on the seed and the shards only, not on `workers`."""
    fills = Fills([tensor for shard in shards for tensor in shard.tensors], quantization, seed)

    def write(index: int, shard: Shard) -> None:
        draw = random.Random(f"{seed}/{index}")
        with (out / shard.file).open("wb") as file:
            file.write(make_header(shard))
            for tensor in shard.tensors:
                for piece in fills.pieces(tensor, draw):
                    _write_all(file, piece)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(write, range(len(shards)), shards))


def copy_tokenizer(tokenizer: Path, out: Path, vocab_size: int) -> None:
    """Copies the tokenizer and its generation_config.json, if there is one and all its ids are in the vocabulary."""
    file = tokenizer / "tokenizer.json"
    largest = max(json.loads(file.read_text())["model"]["vocab"].values()) if file.is_file() else math.inf
    if largest >= vocab_size:
        print(f"no tokenizer: {tokenizer} has none, or one of more than {vocab_size} tokens")
        (out / "generation_config.json").write_text(json.dumps({"do_sample": False}) + "\n")
        return
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, out / name)


def _write_all(file: BinaryIO, piece: memoryview) -> None:
    written = file.write(piece)
    assert written == len(piece), f"{written=} of {len(piece)} bytes"


if __name__ == "__main__":
    main()
