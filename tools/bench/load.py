"""How loading scales: bytes, seconds and memory of each rank, for several numbers of ranks on this machine's CPU.

Usage: python -m tools.bench.load FOLDER --ranks 1 2 4 [--cold]

The last line of stdout is the table as JSON. Seconds depend on whether the files are in the page cache: run twice, or
drop them from it before each load with --cold.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parallel.checkpoint.read_ahead import LIMIT_BYTES
from tools.bench.read import drop_cache
from tools.local_ranks import run_on_ranks

SAMPLE_SEC = 0.005
GB = 1e9
MIB = 2**20


@dataclass(frozen=True)
class RankLoad:
    """One rank's load. Memory is that of the process above what it held just before."""

    bytes_read: int
    sec: float
    gb_per_sec: float
    disk_wait_sec: float
    decode_sec: float
    # Highest sample, and what stays: the weights.
    peak_anonymous_bytes: int
    anonymous_bytes: int
    # Highest sample of the mapped pages of files, which the kernel may take back at any time.
    peak_file_bytes: int


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="config.json and *.safetensors")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from the page cache")
    parser.add_argument("--read-ahead-mib", type=int, default=LIMIT_BYTES // MIB, help="host buffers of a rank")
    parser.add_argument("--timeout-sec", type=float, default=600)
    args = parser.parse_args(argv)
    runs = [bench(args, num_ranks) for num_ranks in args.ranks]
    print("\n".join(table_lines(runs)))
    print(json.dumps({"folder": str(args.folder), "runs": runs}))


def bench(args: argparse.Namespace, num_ranks: int) -> dict[str, Any]:
    if args.cold:
        for file in args.folder.glob("*.safetensors"):
            drop_cache(file)
    limit_bytes = args.read_ahead_mib * MIB
    loads = run_on_ranks(load_one, num_ranks, args.folder, limit_bytes, timeout_sec=args.timeout_sec)
    return {"num_ranks": num_ranks, "cold": args.cold, "ranks": [asdict(load) for load in loads]}


def load_one(communicator: Any, folder: Path, limit_bytes: int) -> RankLoad:
    """What one rank does: builds the model as the checkpoint has it, and loads it between two barriers."""
    import torch
    from transformers import AutoConfig

    from parallel.checkpoint.headers import read_checkpoint
    from parallel.checkpoint.load import load_checkpoint
    from parallel.partition import choose_grain
    from parallel.shard import build_sharded_model

    config = AutoConfig.from_pretrained(folder)
    grain = choose_grain((config.intermediate_size, config.vocab_size), communicator.world_size)
    model = build_sharded_model(config, communicator, dtype=config.dtype or torch.float32, grain=grain)
    checkpoint = read_checkpoint(folder)
    communicator.barrier()
    before = process_memory()
    with sampled_memory() as peak:
        load = load_checkpoint(model, checkpoint, torch.device("cpu"), read_ahead_bytes=limit_bytes)
        after = process_memory()
    return RankLoad(
        bytes_read=load.bytes_read,
        sec=load.sec,
        gb_per_sec=load.bytes_read / load.sec / GB,
        disk_wait_sec=load.disk_wait_sec,
        decode_sec=load.decode_sec,
        peak_anonymous_bytes=max(peak["RssAnon"], after["RssAnon"]) - before["RssAnon"],
        anonymous_bytes=after["RssAnon"] - before["RssAnon"],
        peak_file_bytes=max(peak["RssFile"], after["RssFile"]) - before["RssFile"],
    )


def process_memory() -> dict[str, int]:
    """Bytes of this process that are resident: RssAnon (its own) and RssFile (mapped from files); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


@contextmanager
def sampled_memory() -> Iterator[dict[str, int]]:
    """The highest values of `process_memory` while the body runs, complete once it has ended."""
    peak, stop = process_memory(), threading.Event()

    def look() -> None:
        for name, value in process_memory().items():
            peak[name] = max(peak[name], value)

    def sample() -> None:
        while not stop.wait(SAMPLE_SEC):
            look()
        # What the body ends with counts however seldom this thread had a turn.
        look()

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def table_lines(runs: list[dict[str, Any]]) -> Iterator[str]:
    yield "ranks  rank   read GB  seconds    GB/s  disk s  decode s  peak anonymous GB  kept GB  peak mapped GB"
    for run in runs:
        for rank, load in enumerate(run["ranks"]):
            yield (
                f"{run['num_ranks']:5}  {rank:4}  {load['bytes_read'] / GB:8.4f}  {load['sec']:7.3f}  "
                f"{load['gb_per_sec']:6.2f}  {load['disk_wait_sec']:6.2f}  {load['decode_sec']:8.2f}  "
                f"{load['peak_anonymous_bytes'] / GB:17.4f}  "
                f"{load['anonymous_bytes'] / GB:7.4f}  {load['peak_file_bytes'] / GB:14.4f}"
            )


if __name__ == "__main__":
    main()
