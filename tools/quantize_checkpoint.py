"""Quantise a bf16, fp16 or fp32 checkpoint by rounding to the nearest, tensor by tensor, in bounded memory.

    python -m tools.quantize_checkpoint launcher/models/demo demo-awq --format awq

Embedding, head, norms and biases stay as they are. Meant for tests and demonstrations: AWQ and GPTQ choose better
values than the nearest ones.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from parallel.checkpoint.headers import Checkpoint, TensorEntry, read_checkpoint
from parallel.units import GIB
from tools.checkpoint.quantization import WRITERS, Writer, quantized_tensors
from tools.checkpoint.stored import Shard, folder_problem, make_header, plan_shards, write_index


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.quantize_checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with config.json and *.safetensors")
    parser.add_argument("out", type=Path, help="folder to write; must be empty or new")
    parser.add_argument("--format", choices=WRITERS, required=True)
    parser.add_argument("--shard-gib", type=float, default=5.0, help="largest file (%(default)s)")
    args = parser.parse_args(argv)
    if problem := folder_problem(args.out):
        parser.error(problem)
    if args.shard_gib <= 0:
        parser.error("--shard-gib must be above 0")
    try:
        check_plain(args.source)
        num_bytes = quantize(args.source, args.out, WRITERS[args.format], round(args.shard_gib * GIB))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{args.out}: {num_bytes / 1e9:.3f} GB")


def check_plain(source: Path) -> None:
    """Raises ValueError: the weights are quantised already; they would be copied under another format's name."""
    config = json.loads((source / "config.json").read_text())
    section = config.get("quantization_config") or config.get("compression_config")
    if section:
        method = section.get("quant_method")
        raise ValueError(f"{source} is quantised already ({method}). Give the bf16, fp16 or fp32 checkpoint.")


def quantize(source: Path, out: Path, writer: Writer, max_bytes: int) -> int:
    """Writes the checkpoint; returns the bytes of its tensors."""
    checkpoint = read_checkpoint(source)
    entries = checkpoint.tensors.values()
    tensors = [t for entry in entries for t in quantized_tensors(entry.name, entry.dtype, entry.shape, writer)]
    shards = plan_shards(tensors, max_bytes)
    out.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        write_shard(shard, out, checkpoint, writer)
    write_index(shards, out)
    copy_others(source, out, writer)
    return sum(shard.num_bytes for shard in shards)


def write_shard(shard: Shard, out: Path, checkpoint: Checkpoint, writer: Writer) -> None:
    linear, stored = "", {}
    with (out / shard.file).open("wb") as file:
        file.write(make_header(shard))
        for tensor in shard.tensors:
            if tensor.linear is not None:
                if tensor.linear.name != linear:
                    linear = tensor.linear.name
                    stored = writer.stored(read(checkpoint.tensors[f"{linear}.weight"]))
                values = stored[tensor.part]
            else:
                values = read(checkpoint.tensors[tensor.name])
            assert tuple(values.shape) == tensor.shape, f"{tensor.name}: {values.shape=} {tensor.shape=}"
            file.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)


def read(entry: TensorEntry) -> torch.Tensor:
    with safe_open(entry.file, framework="pt") as handle:
        values: torch.Tensor = handle.get_tensor(entry.name)
        return values.clone()


def copy_others(source: Path, out: Path, writer: Writer) -> None:
    """config.json with quantization_config, and the tokenizer and its like."""
    for file in source.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copyfile(file, out / file.name)
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": writer.config}, indent=2) + "\n")


if __name__ == "__main__":
    main()
