"""The fused kernels on a card: against float64, and against plain torch on the CPU, which rounds at the same places."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from parallel.kernels import fused, reference

pytestmark = pytest.mark.gpu

EPS = 1e-5
TOKENS = (1, 2, 7, 33, 129, 1000)
# Twice half a unit in the last place of bf16 (2**-8 of a number, at most): results are rounded twice.
TWO_ROUNDINGS = 2**-7 * 1.01
# Sums in another order, and another exp, may tip a rounding; seldom.
LEAST_EQUAL = 0.99


def random(*shape: int, gap: int = 0, scale: float = 1.0) -> Tensor:
    """bf16 on the card; rows `gap` numbers longer than they show."""
    wide = torch.randn(*shape[:-1], shape[-1] + gap, device="cuda", dtype=torch.bfloat16) * scale
    return wide[..., : shape[-1]]


def poisoned(shape: tuple[int, ...], call: Callable[[], Tensor]) -> Tensor:
    """What a call gives where its result most likely lies in memory full of NaN."""
    poison = torch.full(shape, float("nan"), dtype=torch.bfloat16, device="cuda")
    del poison
    return call()


def check(case: str, found: Tensor, exact: Tensor, rounded: Tensor, tolerance: float = TWO_ROUNDINGS) -> None:
    """`exact` in float64, `rounded` of the reference in bf16, on the CPU."""
    error = (found.double().cpu() - exact).abs() - exact.abs() * tolerance
    worst = int(error.nan_to_num(float("inf")).argmax())
    got, wanted = float(found.flatten()[worst]), float(exact.flatten()[worst])
    assert bool((error <= 1e-6).all()), f"{case}: {got} for {wanted} at {worst} of {tuple(found.shape)}"
    equal = float((found.cpu() == rounded).double().mean())
    # Of few numbers one may be the seldom one.
    assert equal >= LEAST_EQUAL - 2 / found.numel(), f"{case}: only {equal:.4f} equal what plain torch rounds"


@pytest.mark.parametrize("hidden_size", [8, 64, 1032, 4096, 8192, 8200, 16384])
def test_norms(hidden_size: int) -> None:
    for tokens, gap, has_residual in product(TOKENS, (0, 24), (False, True)):
        case = f"{tokens=} {hidden_size=} {gap=} {has_residual=}"
        hidden = random(tokens, hidden_size, gap=gap)
        residual = random(tokens, hidden_size, gap=2 * gap, scale=3)
        weight = random(hidden_size)
        total = hidden
        if has_residual:
            total = (residual.float() + hidden.float()).bfloat16()
            found = poisoned(hidden.shape, lambda: fused.add_rms_norm(hidden, residual, weight, EPS))  # noqa: B023
            assert torch.equal(residual, total), f"{case}: the residual is not the rounded sum"
        else:
            found = poisoned(hidden.shape, lambda: fused.rms_norm(hidden, weight, EPS))  # noqa: B023
        on_cpu = total.cpu(), weight.cpu()
        exact = reference.rms_norm(*(part.double() for part in on_cpu), EPS)
        check(case, found, exact, reference.rms_norm(*on_cpu, EPS))


def test_norm_of_a_sum_goes_into_some_rows() -> None:
    hidden, residual, output = (random(300, 8192) for _ in range(3))
    weight, before, total = random(8192), output.clone(), residual.clone()
    normed = fused.add_rms_norm(hidden[7:260], total[7:260], weight, EPS)
    fused.add_rms_norm_into(hidden[7:260], residual[7:260], weight, EPS, output[7:260])
    assert torch.equal(residual, total) and torch.equal(output[7:260], normed)
    assert all(torch.equal(output[rows], before[rows]) for rows in (slice(7), slice(260, 300)))


def test_every_number_of_pieces_a_thread_holds_gives_the_same_norm() -> None:
    for hidden_size, vectors in product((8, 520, 8192), (1, 2, 4, 8)):
        hidden, weight = random(5, hidden_size), random(hidden_size)
        exact = reference.rms_norm(hidden.cpu().double(), weight.cpu().double(), EPS)
        found = fused.launch_norm(vectors, hidden, None, weight, EPS)
        rounded = reference.rms_norm(hidden.cpu(), weight.cpu(), EPS)
        check(f"{hidden_size=} {vectors=}", found, exact, rounded)


@pytest.mark.parametrize("inner", [8, 24, 1000, 14336, 28672])
def test_silu_mul(inner: int) -> None:
    for tokens, gap in product(TOKENS[:-1], (0, 16)):
        gate_up = random(tokens, 2 * inner, gap=gap, scale=4)
        found = poisoned((tokens, inner), lambda: fused.silu_mul(gate_up))  # noqa: B023
        on_cpu = gate_up.cpu()
        exact = reference.silu_mul(on_cpu.double())
        check(f"{tokens=} {inner=} {gap=}", found, exact, reference.silu_mul(on_cpu))


def test_silu_of_the_largest_and_smallest() -> None:
    gate = torch.tensor([-3e38, -200.0, -89.0, -1e-30, 0.0, 1e-30, 89.0, 3e38], device="cuda").bfloat16()
    found = fused.silu_mul(torch.cat([gate, torch.ones_like(gate)])[None])
    expected = torch.nn.functional.silu(gate.double())[None]
    assert torch.allclose(found.double(), expected, rtol=2**-8, atol=1e-30), f"{found} for {expected}"


HEADS = {(32, 4): 128, (5, 1): 64, (8, 8): 80, (3, 2): 96, (7, 1): 192, (4, 2): 256, (64, 8): 128}


def make_rotation(
    heads: int, kv_heads: int, head_dim: int, tokens: int, page_size: int, dtype: torch.dtype, has_norms: bool, gap: int
) -> list[Tensor | int | float | None]:
    """The arguments of rotary_and_cache; keys and values lie side by side in a page where there is a gap in rows."""
    num_pages = -(-tokens // page_size) + 3
    shape = (num_pages, 2 if gap else 1, kv_heads, page_size, head_dim)
    pages = [torch.full(shape, 7.0, device="cuda").to(dtype)[:, -1] for _ in range(2)]
    angles = torch.rand(500, head_dim // 2, device="cuda") * 500
    return [
        random(tokens, (heads + 2 * kv_heads) * head_dim, gap=gap),
        angles.cos(),
        angles.sin(),
        torch.randint(0, 500, (tokens,), device="cuda"),
        torch.randperm(num_pages * page_size, device="cuda")[:tokens],
        *pages,
        heads,
        kv_heads,
        *(random(head_dim) if has_norms else None for _ in range(2)),
        EPS,
    ]


def on_cpu(arguments: list[Tensor | int | float | None], *, wide: bool) -> list[Tensor | int | float | None]:
    """The same on the CPU; where `wide`, what is bf16 in float64."""
    moved = [a.cpu() if isinstance(a, Tensor) else a for a in arguments]
    return [a.double() if wide and isinstance(a, Tensor) and a.dtype == torch.bfloat16 else a for a in moved]


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_rotation_into_pages(heads: int, kv_heads: int) -> None:
    head_dim = HEADS[heads, kv_heads]
    for tokens, has_norms, gap in product((1, 7, 130), (False, True), (0, 64)):
        page_size = 64 if gap else 16
        arguments = make_rotation(heads, kv_heads, head_dim, tokens, page_size, torch.bfloat16, has_norms, gap)
        rounded, exact = on_cpu(arguments, wide=False), on_cpu(arguments, wide=True)
        outcomes = [(reference.rotary_and_cache(*each), *each[5:7]) for each in (exact, rounded)]
        query = poisoned((tokens, heads, head_dim), lambda: fused.rotary_and_cache(*arguments))  # noqa: B023
        found = (query, *arguments[5:7])
        case = f"{heads=} {kv_heads=} {head_dim=} {tokens=} {has_norms=} {gap=}"
        assert torch.equal(found[2].cpu(), outcomes[1][2]), f"{case}: values"
        for name, mine, wide, narrow in zip(("query", "keys"), found, *outcomes, strict=False):
            # The sum of two terms may be much smaller than they are; a norm rounds each of them twice beforehand.
            error = float((mine.double().cpu() - wide).abs().max() / wide.abs().max())
            assert error < (3 if has_norms else 1) * 2**-8, f"{case}: {name} off by {error:.2e} of the largest"
            equal = float((mine.cpu() == narrow).double().mean())
            assert equal > 0.98, f"{case}: {name}: only {equal:.4f} equal what plain torch rounds"


def test_keys_and_values_in_e4m3() -> None:
    for (heads, kv_heads), gap in product(((32, 4), (5, 1), (8, 8)), (0, 64)):
        head_dim = HEADS[heads, kv_heads]
        arguments = make_rotation(heads, kv_heads, head_dim, 33, 64, torch.float8_e4m3fn, True, gap)
        expected = on_cpu(arguments, wide=False)
        reference.rotary_and_cache(*expected)
        fused.rotary_and_cache(*arguments)
        equal = [
            float((mine.cpu().view(torch.uint8) == theirs.view(torch.uint8)).double().mean())
            for mine, theirs in zip(arguments[5:7], expected[5:7], strict=True)
        ]
        assert equal[0] > 0.98 and equal[1] == 1, f"{heads=} {kv_heads=} {gap=}: {equal=} of keys and values"


def test_every_bf16_number_becomes_its_e4m3() -> None:
    every = torch.arange(2**16, dtype=torch.int32, device="cuda").to(torch.int16).view(torch.bfloat16)
    arguments = make_rotation(1, 8, 128, 64, 64, torch.float8_e4m3fn, False, 0)
    arguments[0] = torch.cat([random(64, 9 * 128), every.view(64, 8 * 128)], dim=1)
    arguments[4] = torch.arange(64, device="cuda")
    fused.rotary_and_cache(*arguments)
    every = every.cpu()
    found = arguments[6][0].transpose(0, 1).reshape(-1).view(torch.uint8).cpu()
    expected = every.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    # Whatever the sign of what is no number.
    found[every.isnan()] |= 0x80
    expected[every.isnan()] |= 0x80
    wrong = [(f"{float(every[i]):g}", hex(found[i]), hex(expected[i])) for i in (found != expected).nonzero().flatten()]
    assert not wrong, f"{len(wrong)} of 65536, such as (number, found, expected) {wrong[:5]}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_and_odd_sizes_go_through_plain_torch(dtype: torch.dtype) -> None:
    hidden, weight = (torch.randn(size, device="cuda").to(dtype) for size in ((3, 100), (100,)))
    expected = reference.rms_norm(hidden.cpu(), weight.cpu(), EPS)
    assert torch.allclose(fused.rms_norm(hidden, weight, EPS).cpu(), expected, rtol=2e-3, atol=1e-5)
    gate_up = random(3, 2 * 12)
    assert torch.allclose(fused.silu_mul(gate_up).cpu(), reference.silu_mul(gate_up.cpu()), rtol=2**-7, atol=1e-6)
    assert fused.problem(torch.device("cuda", 0)) is None


def test_a_layer_of_them_is_captured_in_a_graph() -> None:
    """Replays read what lies in the inputs by then, and write where the slots by then say."""
    arguments = make_rotation(32, 4, 128, 8, 64, torch.bfloat16, False, 0)
    hidden, residual, weight, gate_up = random(8, 4096), random(8, 4096), random(4096), random(8, 2048)

    def step() -> list[Tensor]:
        normed = fused.add_rms_norm(hidden, residual, weight, EPS)
        return [
            normed,
            fused.rms_norm(normed, weight, EPS),
            fused.silu_mul(gate_up),
            fused.rotary_and_cache(*arguments),
        ]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for changed in (hidden, residual, gate_up, arguments[0]):
        changed.normal_()
    arguments[3].random_(0, 500)
    arguments[4].copy_(torch.randperm(64, device="cuda")[:8])
    before = residual.clone()
    written = [residual, *arguments[5:7]]
    expected = [part.clone() for part in (*step(), *written)]
    residual.copy_(before)
    for part in (*outputs, *arguments[5:7]):
        part.fill_(float("nan"))
    graph.replay()
    pages, places = arguments[4] // 64, arguments[4] % 64
    for place, (mine, theirs) in enumerate(zip((*outputs, *written), expected, strict=True)):
        in_pages = mine.dim() == 4
        found, wanted = (part[pages, :, places] if in_pages else part for part in (mine, theirs))
        assert torch.equal(found, wanted), f"{place} of normed, normed, silu, query, residual, keys, values"
