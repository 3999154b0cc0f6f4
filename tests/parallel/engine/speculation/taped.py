"""Calls on a CPU in place of a CUDA graph: operators with the very tensors and numbers of the first time, again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")
# These tell the host what a tensor holds, which no graph can.
READ_BY_HOST = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.is_nonzero.default"}


class Tape(TorchDispatchMode):
    """Keeps every operator that is called inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Sequence[Any], Mapping[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        assert str(func) not in READ_BY_HOST, func
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        """All of them, in order; results are where they were."""
        for func, args, kwargs, before in self.calls:
            after = func(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def taped(run: Callable[[], Result], pool: Any) -> tuple[Callable[[], object], Result]:
    """As draft_graphs.captured."""
    tape = Tape()
    with torch.inference_mode(), tape:
        result = run()
    return tape.replay, result
