"""Runs a command on a card whose link to the host is shared with copies from here, as on a slower one:

    python -m tools.busy_link -- torchrun -m launcher task=bench gpus=1 ...

Plain copies from pinned memory go on until the command ends, and get about as much of the link as the command's. That
leaves the command half of the link's rate in turns, not wires of half the rate. What was left for plain copies a run
with streamed layers measures itself (`offload.copy_gb_per_sec`), before its steps and in the same way with this tool
and without. The command's exit status is that of the tool.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Sequence

import torch

from parallel.offload.host_trial import COPY_BYTES, NUM_QUEUED, Link

# A small part of the time in which the copies that are queued go on.
WAIT_SEC = 0.1 * NUM_QUEUED * COPY_BYTES / 60e9


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.busy_link", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--card", type=int, default=0, help="its number (%(default)s)")
    parser.add_argument("command", nargs="+", help="what to run, behind --")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("there is no card whose link could be kept busy")
    link = Link(torch.device("cuda", args.card))
    alone = link.measure()
    status, beside = run_beside(link, args.command)
    print(json.dumps({"alone_gb_per_sec": alone / 1e9, "beside_gb_per_sec": beside / 1e9}))
    raise SystemExit(status)


def run_beside(link: Link, command: Sequence[str]) -> tuple[int, float]:
    """The exit status of `command`, and the bytes a second that copies got meanwhile."""
    link.num_done, start = 0, time.perf_counter()
    link.keep_busy()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            link.keep_busy()
            time.sleep(WAIT_SEC)
        return process.returncode, link.num_done * COPY_BYTES / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
