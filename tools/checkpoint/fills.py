"""Random bytes for the tensors of a synthetic checkpoint: pieces of small blocks, by what a tensor is."""

import random
from collections.abc import Callable, Iterable, Iterator

import torch

from parallel.checkpoint.headers import BYTES_PER_ELEMENT
from parallel.formats.nf4 import STATE, nf4_codebook
from parallel.formats.scheme import Scheme
from tools.checkpoint.nf4 import nested_map, state_bytes
from tools.checkpoint.quantization import TORCH_DTYPES, WRITERS
from tools.checkpoint.stored import Linear, Tensor

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
    return scale_of(scheme) * (0.9 + 0.2 * torch.rand(BLOCK_ELEMENTS, generator=generator))


def nested_scales(generator: torch.Generator, scheme: Scheme | None) -> torch.Tensor:
    """The tenth, of which a byte takes part or all."""
    assert scheme is not None
    return torch.full((BLOCK_ELEMENTS,), 0.1 * scale_of(scheme))


def scale_of(scheme: Scheme) -> float:
    if scheme.has_codebook:
        return STANDARD_DEVIATION / float(nf4_codebook().std(correction=0))
    return STANDARD_DEVIATION / (FLOAT8_SPREAD if scheme.is_float else 2**scheme.bits / 12**0.5)


def float8(generator: torch.Generator, scheme: Scheme | None) -> torch.Tensor:
    return (FLOAT8_SPREAD * torch.randn(BLOCK_ELEMENTS, generator=generator)).clamp(-448, 448)


# The end of a name -> what fills it; first match. Other weights are noise.
KINDS: dict[str, Block] = {
    "norm.weight": ones,
    ".qweight": words,
    ".weight_packed": words,
    ".qzeros": zeros,
    ".weight_zero_point": zeros,
    ".scales": scales,
    ".weight_scale": scales,
    ".weight_scale_inv": scales,
    ".nested_absmax": nested_scales,
}
# What says more than the name.
BY_DTYPE: dict[str, Block] = {"F8_E4M3": float8, "U8": words}


class Fills:
    """The bytes of any of `tensors`, from blocks that are made once."""

    def __init__(self, tensors: Iterable[Tensor], quantization: str | None, seed: int) -> None:
        self.scheme = None if quantization is None else WRITERS[quantization].scheme
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
        """Values that follow from the shapes: the group of each input, the shape of a packed weight, tables."""
        if tensor.linear is None:
            return None
        assert self.scheme is not None
        computed = COMPUTED.get(tensor.part)
        return None if computed is None else computed(tensor.linear, self.scheme)


def group_of(linear: Linear, scheme: Scheme) -> torch.Tensor:
    num_in = linear.shape[1]
    order = torch.arange(num_in)
    if scheme.act_order:
        order = torch.randperm(num_in, generator=torch.Generator().manual_seed(num_in))
    return order // (scheme.group_size or num_in)


# What does not come out of a block, by part.
COMPUTED: dict[str, Callable[[Linear, Scheme], torch.Tensor]] = {
    "g_idx": group_of,
    "weight_g_idx": group_of,
    "weight_shape": lambda linear, scheme: torch.tensor(linear.shape),
    "weight.quant_map": lambda linear, scheme: nf4_codebook(),
    "weight.nested_quant_map": lambda linear, scheme: nested_map(),
    STATE: lambda linear, scheme: state_bytes(linear.shape, scheme, scale_of(scheme)),
}


def kind_of(tensor: Tensor) -> Block:
    if tensor.dtype in BY_DTYPE:
        return BY_DTYPE[tensor.dtype]
    return next((block for ending, block in KINDS.items() if tensor.name.endswith(ending)), noise)


def as_bytes(values: torch.Tensor) -> memoryview:
    return values.contiguous().view(torch.uint8).numpy().data
