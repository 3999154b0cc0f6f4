"""Errors that drivers and NCCL give, and what users are told to do."""

from __future__ import annotations

import pytest

from parallel.transports.advice import advice, failed_test, reason_of

# As torch words it; the first line alone is more than half of what ranks tell one another.
NCCL_ERROR = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled system error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.28.9\nncclSystemError: System call (e.g. socket, malloc) or external "
    "library call failed or device error. \nLast error:\n{}"
)
NO_ROOM = (
    "Error while creating shared memory segment /dev/shm/nccl-KWfVyt (size 9637888), error: No space left on device"
)


@pytest.mark.parametrize(
    ("error", "reason", "helps"),
    [
        (NCCL_ERROR.format(NO_ROOM), f"NCCL: {NO_ROOM}", "docker run --shm-size 1g"),
        (NCCL_ERROR.format("Bootstrap : no socket interface found"), "NCCL: Bootstrap", "NCCL_SOCKET_IFNAME=lo"),
        (NCCL_ERROR.format("Cuda failure 2 'out of memory'"), "NCCL: Cuda failure", "nvidia-smi"),
        (NCCL_ERROR.format("Cuda failure 35 'CUDA driver version is insufficient'"), "NCCL: Cuda", "Update the driver"),
        (NCCL_ERROR.partition("\n")[0].replace("system", "cuda"), "NCCL error in: ", "limits.peer_access=off"),
        ("cuMemHostRegister_v2 failed with CUDA_ERROR_OUT_OF_MEMORY", "cuMemHostRegister_v2", "--ulimit memlock=-1"),
        ("gave wrong sums of 4 bytes of float32", "gave wrong sums", "limits.peer_access=off"),
    ],
)
def test_what_went_wrong_is_told_with_what_helps(error: str, reason: str, helps: str) -> None:
    found = reason_of(RuntimeError(error))
    assert found.startswith(reason) and "\n" not in found
    message = failed_test("nccl", f"rank 1: {found}")
    assert message.startswith(f"the self-test of nccl failed on rank 1: {reason}") and helps in message
    # The words of one kind of problem are not those of another.
    assert sum(part in message for part in ("--shm-size", "IFNAME", "nvidia-smi", "memlock", "peer_access")) == 1


def test_of_a_system_error_without_a_cause_all_is_told_that_may_be_it() -> None:
    message = failed_test("nccl", reason_of(RuntimeError(NCCL_ERROR.format(""))))
    assert "--shm-size 1g" in message and "NCCL_SOCKET_IFNAME=lo" in message


def test_nothing_is_advised_where_nobody_knows() -> None:
    assert advice("gave wrong sums of 4 bytes") == ""
    assert reason_of(RuntimeError()) == "RuntimeError()"
