"""What operations of torch move: bytes that they read and write, and whether the host waits for a result."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They give the host a value.
WAITING = ("_local_scalar_dense", "equal", "nonzero", "masked_select")


class Moved(TorchDispatchMode):
    """Context manager that counts the operations in it, views and empty memory left out.

    `num_bytes`: of all tensors that they take and give, each once. `waits`: the names of those that the host waits for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self.waits: list[str] = []

    def add(self, *tensors: Tensor | None) -> None:
        """What a kernel of ours reads or writes."""
        self.num_bytes += sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given, made = (
            [each for each in tree_leaves(tree) if isinstance(each, Tensor)] for tree in ((args, kwargs), result)
        )
        name = function.overloadpacket.__name__
        if name in WAITING:
            self.waits.append(name)
        if not function.is_view and not name.startswith(("empty", "new_empty")):
            self.add(*given, *made)
        return result
