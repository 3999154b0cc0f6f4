"""What to try where a transport does not work: users know neither NCCL's words nor the driver's."""

from __future__ import annotations

PEER_ACCESS = "Broken peer access does this: try limits.peer_access=off, another engine.transport, and task=probe."
# What hangs says no word: all that is known to.
HANGS = (
    "Broken peer access hangs like this: try limits.peer_access=off. So do sockets that a firewall or a VPN holds up: "
    "try NCCL_SOCKET_IFNAME=lo and GLOO_SOCKET_IFNAME=lo. task=probe tests the links alone."
)
SHARED_MEMORY = (
    "NCCL needs room in /dev/shm, of which containers have 64 MB unless told otherwise: docker run --shm-size 1g. Runs "
    "that were killed may have left /dev/shm/nccl-*, which can be deleted."
)
SOCKETS = "NCCL's ranks meet through sockets: NCCL_SOCKET_IFNAME=lo keeps these within the machine."
CARD_MEMORY = "Other processes have the cards' memory: see nvidia-smi."
PINNED = "Raise the limit of locked memory: ulimit -l unlimited, or docker run --ulimit memlock=-1."
DRIVER = "Update the driver of the host: nvidia-smi says which CUDA it knows."
# Words of an error, in lower case, and what helps; the first that fits.
KNOWN = (
    (("/dev/shm", "shared memory segment", "no space left"), SHARED_MEMORY),
    (("memhostregister",), PINNED),
    (("driver version", "unsupported ptx", "cannot load cuda's driver"), DRIVER),
    (("out of memory", "out_of_memory"), CARD_MEMORY),
    (("unhandled system error",), f"{SHARED_MEMORY} {SOCKETS}"),
    (("socket", "bootstrap", "interface", "connection refused"), SOCKETS),
)


def advice(problem: str) -> str:
    """What to do about a problem that is none of a sum; "" where nobody knows."""
    text = problem.lower()
    return next((found for words, found in KNOWN if any(word in text for word in words)), "")


def failed_test(name: str, problem: str) -> str:
    """The message where nothing else can take the place of what failed."""
    return f"the self-test of {name} failed on {problem.removesuffix('.')}. {advice(problem) or PEER_ACCESS}"


def reason_of(error: Exception) -> str:
    """What an exception says, in a line. NCCL's own comes last, below several that say where it was called."""
    lines = [line.strip() for line in (str(error) or repr(error)).splitlines() if line.strip()]
    last = next((at for at, line in enumerate(lines) if line.startswith("Last error:")), None)
    if last is None:
        return " ".join(lines)
    own = " ".join([lines[last].removeprefix("Last error:"), *lines[last + 1 :]]).strip()
    return f"NCCL: {own}" if own else " ".join(lines[:last])
