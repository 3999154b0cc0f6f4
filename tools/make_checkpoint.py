"""Write a synthetic dense checkpoint: random weights of a real model's shape, for timing loads and decode steps.

Files are written piece by piece from one small block of random numbers, so that memory stays small and the disk sets
the pace. The text such a model makes is noise.

    python -m tools.make_checkpoint --preset 8b --out /dev/shm/random-8b
"""

import argparse
import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

GIB = 1024**3
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
# The spread with which these families are initialised; activations stay finite in all dtypes at 80 layers.
STANDARD_DEVIATION = 0.02
# Large enough that weights look random to any layer, small enough to stay in a processor's cache.
BLOCK_ELEMENTS = 4 * 1024**2 + 61
TOKENIZER = Path("launcher/models/demo")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    num_bytes: int
    is_norm: bool


@dataclass(frozen=True)
class Shard:
    file: str
    tensors: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


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
    add("--shard-gib", type=float, default=5.0, help="largest file, unless one tensor is larger (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="files written at once (%(default)s)")
    add("--tokenizer", type=Path, default=TOKENIZER, help="folder of the tokenizer to copy (%(default)s)")
    args = parser.parse_args(argv)
    if args.shard_gib <= 0 or args.workers < 1:
        parser.error("--shard-gib must be above 0 and --workers at least 1")
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out {args.out} is not empty; give another folder")
    return args


def main(argv: list[str] | None = None) -> None:
    """Config -> names and shapes from transformers -> files -> index; prints what it wrote and how fast."""
    args = parse_arguments(argv)
    config = make_config(args)
    shards = plan_shards(list_tensors(config, args.dtype), round(args.shard_gib * GIB))
    num_bytes = sum(shard.num_bytes for shard in shards)
    args.out.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(args.out).free
    if free_bytes < num_bytes:
        raise SystemExit(f"{args.out} has {free_bytes / GIB:.1f} GiB free, the checkpoint takes {num_bytes / GIB:.1f}.")
    start = time.perf_counter()
    write_shards(shards, args.out, args.dtype, args.seed, args.workers)
    sec = time.perf_counter() - start
    config.save_pretrained(args.out)
    write_index(shards, args.out)
    copy_tokenizer(args.tokenizer, args.out, config.vocab_size)
    speed = f"{sec:.1f} s, {num_bytes / 1e9 / sec:.2f} GB/s"
    print(f"{args.out}: {num_bytes / 1e9:.2f} GB in {len(shards)} files, {speed}")


def make_config(args: argparse.Namespace) -> PretrainedConfig:
    """The model's config in transformers' own class.

    Raises:
        ValueError: heads do not divide.
    """
    sizes = dict(zip(SIZE_NAMES, PRESETS[args.preset], strict=True))
    sizes |= {name: getattr(args, name) for name in SIZE_NAMES if getattr(args, name) is not None}
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        raise ValueError(
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


def list_tensors(config: PretrainedConfig, dtype: str) -> list[Tensor]:
    """What a checkpoint of the model holds, in the model's order; nothing is allocated. Sets config.architectures."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    element_bytes = DTYPES[dtype][0].itemsize
    # A tied head appears once, under the embedding's name.
    return [
        Tensor(name, tuple(weight.shape), weight.numel() * element_bytes, is_norm="norm" in name)
        for name, weight in model.named_parameters()
    ]


def plan_shards(tensors: list[Tensor], max_bytes: int) -> list[Shard]:
    """Deal tensors in order over files of at most `max_bytes`; a larger tensor has a file to itself."""
    groups: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(t.num_bytes for t in groups[-1]) + tensor.num_bytes > max_bytes:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(tensors))]
    return [
        Shard(f"model-{i:05}-of-{len(groups):05}.safetensors", tuple(group)) for i, group in enumerate(groups, start=1)
    ]


def write_shards(shards: list[Shard], out: Path, dtype: str, seed: int, workers: int) -> None:
    """Writes all files; the bytes depend on the seed and the shards only, not on `workers`."""
    torch_dtype, stored_dtype = DTYPES[dtype]
    noise = _block(
        STANDARD_DEVIATION * torch.randn(BLOCK_ELEMENTS, generator=torch.Generator().manual_seed(seed)), dtype
    )
    ones = _block(torch.ones(BLOCK_ELEMENTS), dtype)

    def write(index: int, shard: Shard) -> None:
        draw = random.Random(f"{seed}/{index}")
        with (out / shard.file).open("wb") as file:
            file.write(make_header(shard, stored_dtype))
            for tensor in shard.tensors:
                for piece in _pieces(ones if tensor.is_norm else noise, tensor.num_bytes, torch_dtype.itemsize, draw):
                    _write_all(file, piece)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(write, range(len(shards)), shards))


def make_header(shard: Shard, stored_dtype: str) -> bytes:
    """Length and JSON of a safetensors file, padded with spaces so that the data starts at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard.tensors:
        end = offset + tensor.num_bytes
        entries[tensor.name] = {"dtype": stored_dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_index(shards: list[Shard], out: Path) -> None:
    """model.safetensors.index.json, where there are several files."""
    if len(shards) == 1:
        return
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    index = {"metadata": {"total_size": sum(shard.num_bytes for shard in shards)}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


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


def _block(values: torch.Tensor, dtype: str) -> memoryview:
    return values.to(DTYPES[dtype][0]).view(torch.uint8).numpy().data


def _pieces(block: memoryview, num_bytes: int, element_bytes: int, draw: random.Random) -> Iterator[memoryview]:
    """Parts of `block` that add up to `num_bytes`, each from an element drawn at random."""
    while num_bytes > 0:
        start = draw.randrange(len(block) // element_bytes) * element_bytes
        piece = block[start : start + num_bytes]
        num_bytes -= len(piece)
        yield piece


def _write_all(file: BinaryIO, piece: memoryview) -> None:
    written = file.write(piece)
    assert written == len(piece), f"{written=} of {len(piece)} bytes"


if __name__ == "__main__":
    main()
