"""Random bytes for the tensors of a synthetic checkpoint: pieces of small blocks, by what a tensor is."""

import random
from collections.abc import Callable, Iterable, Iterator

import torch

from parallel.checkpoint.formats.scheme import Scheme
from parallel.checkpoint.headers import BYTES_PER_ELEMENT
from tools.quantization import TORCH_DTYPES, WRITERS
from tools.stored import Tensor

# The spread with which these families are initialised; activations stay finite in all dtypes at 80 layers.
STANDARD_DEVIATION = 0.02
# Large enough that weights look random to any layer, small enough to stay in a processor's cache.
BLOCK_ELEMENTS = 4 * 1024**2 + 61
FLOAT8_SPREAD = 64.0
Block = Callable[[torch.Generator, Scheme | None], torch.Tensor]


def noise(generator: torch.Generator, scheme: Scheme | None) -> torch.Tensor:
    return STANDARD_DEVIATION * torch.randn(BLOCK_ELEMENTS, generator=generator)


def ones(generator: torch.Generator, scheme: Scheme | None) -> torch.Tensor:
    return torch.ones(BLOCK_ELEMENTS)


def words(generator: torch.Generator, scheme: Scheme | None) -> torch.Tensor:
    """Random bits: values of every size are equally likely."""
    return torch.randint(-(2**31), 2**31, (BLOCK_ELEMENTS,), generator=generator)


def zeros(generator: torch.Generator, scheme: Scheme | None) -> torch.Tensor:
    """Zeros in the middle, so that random values have no common bias."""
    assert scheme is not None
    stored = 2 ** (scheme.bits - 1) - scheme.zeros_less_one
    word = sum(stored << bits for bits in range(0, 32, scheme.bits))
    return torch.full((BLOCK_ELEMENTS,), word if word < 2**31 else word - 2**32)


def scales(generator: torch.Generator, scheme: Scheme | None) -> torch.Tensor:
    """What gives weights the same spread as plain ones; a tenth more or less."""
    assert scheme is not None
    spread = FLOAT8_SPREAD if scheme.is_float else 2**scheme.bits / 12**0.5
    return STANDARD_DEVIATION / spread * (0.9 + 0.2 * torch.rand(BLOCK_ELEMENTS, generator=generator))


def float8(generator: torch.Generator, scheme: Scheme | None) -> torch.Tensor:
    return (FLOAT8_SPREAD * torch.randn(BLOCK_ELEMENTS, generator=generator)).clamp(-448, 448)


# The end of a name -> what fills it; first match. Other weights are noise.
KINDS: dict[str, Block] = {
    "norm.weight": ones,
    ".qweight": words,
    ".weight_packed": words,
    ".qzeros": zeros,
    ".scales": scales,
    ".weight_scale": scales,
}


class Fills:
    """The bytes of any of `tensors`, from blocks that are made once."""

    def __init__(self, tensors: Iterable[Tensor], quantization: str | None, seed: int) -> None:
        self.scheme = None if quantization is None else WRITERS[quantization].scheme
        self.shapes = {tensor.name: tensor.shape for tensor in tensors}
        self.blocks: dict[tuple[Block, str], memoryview] = {}
        for tensor in tensors:
            key = (kind_of(tensor), tensor.dtype)
            if key not in self.blocks:
                values = key[0](torch.Generator().manual_seed(seed), self.scheme)
                self.blocks[key] = as_bytes(values.to(TORCH_DTYPES[tensor.dtype]))

    def pieces(self, tensor: Tensor, draw: random.Random) -> Iterator[memoryview]:
        """Bytes of `tensor`, piece by piece, each from an element of its block drawn at random."""
        computed = self.computed(tensor)
        if computed is not None:
            yield as_bytes(computed.to(TORCH_DTYPES[tensor.dtype]))
            return
        block = self.blocks[kind_of(tensor), tensor.dtype]
        num_bytes, element_bytes = tensor.num_bytes, BYTES_PER_ELEMENT[tensor.dtype]
        while num_bytes > 0:
            start = draw.randrange(len(block) // element_bytes) * element_bytes
            piece = block[start : start + num_bytes]
            num_bytes -= len(piece)
            yield piece

    def computed(self, tensor: Tensor) -> torch.Tensor | None:
        """Values that follow from the shapes: the group of each input, the shape of a packed weight."""
        linear, _, part = tensor.name.rpartition(".")
        if part == "g_idx":
            assert self.scheme is not None
            return torch.arange(tensor.shape[0]) // (self.scheme.group_size or tensor.shape[0])
        if part == "weight_shape":
            assert self.scheme is not None
            num_out, num_words = self.shapes[f"{linear}.weight_packed"]
            return torch.tensor([num_out, num_words * 32 // self.scheme.bits])
        return None


def kind_of(tensor: Tensor) -> Block:
    if tensor.dtype == "F8_E4M3":
        return float8
    return next((block for ending, block in KINDS.items() if tensor.name.endswith(ending)), noise)


def as_bytes(values: torch.Tensor) -> memoryview:
    return values.contiguous().view(torch.uint8).numpy().data
