"""Picking tokens: greedy by the lowest id, draws by the exact probabilities, and the same token on every rank."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.engine.answer import StopRules
from parallel.engine.generate import Listener, Prompt, generate
from parallel.engine.noise import exponential_noise
from parallel.engine.pending import ModelError
from parallel.engine.sampling import (
    NO_NUMBER,
    Sampler,
    SamplingParams,
    VocabularyShards,
    checked,
    gather_logits,
    greedy_tokens,
    sampled_guesses,
    sampled_tokens,
    sequence_key,
)
from parallel.transports.solo import Solo
from tests.parallel.ranks import CPU, demo_tokenizer, make_engine, run_on_ranks
from tests.parallel.small_models import prompts_of

UNEVEN = {1: (11,), 2: (6, 5), 3: (3, 7, 1), 4: (4, 1, 2, 4)}
SAMPLING = SamplingParams(temperature=0.8, top_k=9, top_p=0.9, seed=5)
LOGITS = torch.tensor([2.0, 0.1, 1.2, -0.7, 1.6, 0.4, 1.1, -3.0, 0.9, -1.5])


def tied_logits() -> Tensor:
    """[300, 11] of few different values, so that most rows have several largest, in one shard and over shards."""
    return torch.randint(0, 3, (300, 11), generator=torch.Generator().manual_seed(0)).float()


def local_part(logits: Tensor, communicator: Communicator) -> tuple[Tensor, VocabularyShards]:
    shards = VocabularyShards(UNEVEN[communicator.world_size])
    return logits.split(shards.sizes, dim=-1)[communicator.rank], shards


def pick_greedy(communicator: Communicator, logits: Tensor) -> Tensor:
    return greedy_tokens(*local_part(logits, communicator), communicator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
def test_greedy_ties_go_to_the_lowest_id_of_all_shards(world_size: int, dtype: torch.dtype) -> None:
    logits = tied_logits().to(dtype)
    lowest = torch.tensor([row.index(max(row)) for row in logits.tolist()])
    for tokens in run_on_ranks(pick_greedy, world_size, logits):
        assert torch.equal(tokens, lowest)


@pytest.mark.parametrize(("bad", "token"), [(torch.nan, NO_NUMBER), (torch.inf, NO_NUMBER), (-torch.inf, 5)])
def test_a_row_without_numbers_has_no_token(bad: float, token: int) -> None:
    """One such logit is enough, but for that of a token which is never drawn."""
    logits = torch.randn(3, 11)
    logits[1, 7] = bad
    assert checked(torch.tensor([4, 5, 6]), logits).tolist() == [4, token, 6]


def answers_without_numbers(
    communicator: Communicator, folder: Path, sampling: SamplingParams | None
) -> tuple[int, str]:
    """The prompt, and what is said, of a model that overflows for tokens of the second one alone."""
    engine = make_engine(communicator, folder, sampling=sampling, batch_size=1)
    engine.model.model.embed_tokens.weight.data[77] = torch.inf
    prompts, shown = [Prompt(4, [5, 6, 7]), Prompt(9, [5, 77])], []
    with pytest.raises(ModelError) as error:
        generate(
            engine,
            prompts,
            demo_tokenizer(),
            StopRules(3),
            Listener(on_answer=lambda row, answer: shown.append(answer.token_ids)),
        )
    assert [len(each) for each in shown] == [3]
    return error.value.index, str(error.value)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("sampling", [None, SAMPLING], ids=["greedy", "sampled"])
def test_nothing_is_answered_by_what_is_no_number(
    world_size: int, sampling: SamplingParams | None, folders: dict[str, Path]
) -> None:
    for index, message in run_on_ranks(answers_without_numbers, world_size, folders["llama"], sampling):
        assert index == 9 and message.startswith("after a prompt the model gives no numbers (NaN, or infinity).")


def gather(communicator: Communicator, logits: Tensor) -> Tensor:
    return gather_logits(*local_part(logits, communicator), communicator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
def test_gathered_logits_are_the_whole_in_order(world_size: int, dtype: torch.dtype) -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    for gathered in run_on_ranks(gather, world_size, logits):
        assert gathered.dtype == dtype
        assert torch.equal(gathered, logits)


def exact_probabilities(params: SamplingParams) -> list[float]:
    """By the definitions: softmax at the temperature, then the top_k likeliest, then the fewest that reach top_p."""
    weights = (LOGITS.double() / params.temperature).exp().tolist()
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    kept = order[: params.top_k] if params.top_k else order
    total = sum(weights[token] for token in kept)
    nucleus, reached = [], 0.0
    for token in kept:
        if reached >= params.top_p:
            break
        nucleus.append(token)
        reached += weights[token] / total
    total = sum(weights[token] for token in nucleus)
    return [weights[token] / total if token in nucleus else 0.0 for token in range(len(weights))]


def assert_frequencies(tokens: Tensor, params: SamplingParams) -> None:
    """Each count within five standard deviations of the binomial distribution; what has no probability never drawn."""
    counts = tokens.flatten().bincount(minlength=len(LOGITS)).tolist()
    for count, p in zip(counts, exact_probabilities(params), strict=True):
        assert abs(count - tokens.numel() * p) <= 5 * (tokens.numel() * p * (1 - p)) ** 0.5, counts


def keys_of(params: SamplingParams, prompt_indices: Sequence[int]) -> Tensor:
    return torch.tensor([sequence_key(params.seed, index) for index in prompt_indices])


def draw(params: SamplingParams, prompt_indices: Sequence[int], num_steps: int) -> Tensor:
    """[step, prompt] tokens of prompts that all see LOGITS at every step."""
    sample = Sampler(params, VocabularyShards((len(LOGITS),)), Solo(CPU))
    keys, logits = keys_of(params, prompt_indices), LOGITS.expand(len(prompt_indices), -1)
    return torch.stack([sample(logits, keys, torch.full_like(keys, step)) for step in range(num_steps)])


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.7),
        SamplingParams(temperature=1.0, top_k=4),
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_k=1000),
        SamplingParams(temperature=1.0, top_p=0.7),
        SamplingParams(temperature=2.0, top_p=0.6),
        SamplingParams(temperature=1.0, top_p=0.01),
        SamplingParams(temperature=1.5, top_k=5, top_p=0.8),
    ],
    ids=str,
)
def test_frequencies_are_the_exact_probabilities(params: SamplingParams) -> None:
    assert_frequencies(draw(params, range(100), 200), params)


def test_first_draws_of_many_prompts_are_independent() -> None:
    """Generators seeded by neighbouring numbers must not draw alike."""
    params = SamplingParams(temperature=1.0)
    assert_frequencies(draw(params, range(5000), 1), params)
    assert_frequencies(torch.stack([draw(SamplingParams(1.0, seed=seed), [0], 1) for seed in range(5000)]), params)


@pytest.mark.parametrize("temperature", [1e-4, 1e-40, 5e-324])
def test_temperature_close_to_zero_is_greedy(temperature: float) -> None:
    logits, keys = LOGITS.flip(0).expand(20, -1), torch.arange(20)
    noise = exponential_noise(keys, keys, len(LOGITS))
    assert sampled_tokens(logits, SamplingParams(temperature), noise).tolist() == [len(LOGITS) - 1] * 20


def test_seed_changes_the_draws() -> None:
    draws = [tuple(draw(SamplingParams(1.0, seed=seed), [3], 40).flatten().tolist()) for seed in (0, 1, 2, -1, 2**40)]
    assert len(set(draws)) == len(draws)
    assert draws[1] == tuple(draw(SamplingParams(1.0, seed=1), [3], 40).flatten().tolist())


def test_prompt_index_changes_the_draws() -> None:
    draws = draw(SamplingParams(temperature=1.0), range(50), 40).T.tolist()
    assert len(set(map(tuple, draws))) == 50


def test_keys_differ_and_fit_int64() -> None:
    keys = [sequence_key(seed, index) for seed in (-(2**70), -1, 0, 1, 2**32, 2**70) for index in range(2000)]
    assert len(set(keys)) == len(keys)
    assert torch.tensor(keys).dtype == torch.int64
    assert min(keys) < 0 < max(keys)


def test_noise_is_exponential_and_independent_between_keys_steps_and_tokens() -> None:
    """Moments of Exp(1) within five standard errors, its distribution by Kolmogorov and Smirnov, no correlation."""
    noise = exponential_noise(torch.arange(40).repeat_interleave(40), torch.arange(40).repeat(40), 500).double()
    count = noise.numel()
    assert abs(noise.mean() - 1) < 5 / count**0.5
    assert abs(noise.var() - 1) < 5 * (8 / count) ** 0.5
    steps = torch.arange(count) / count
    assert (1 - torch.exp(-noise.flatten().sort().values) - steps).abs().max() < 2.0 / count**0.5
    assert noise.min() > 0
    centred = (noise - 1).view(40, 40, 500)
    pairs = [(centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1]), (centred[..., 1:], centred[..., :-1])]
    for left, right in pairs:
        assert abs((left * right).mean()) < 5 / left.numel() ** 0.5


def test_draws_do_not_depend_on_the_other_rows() -> None:
    params = SamplingParams(temperature=1.0)
    together = draw(params, [4, 7, 9], 30)
    assert torch.equal(together[:, 1:2], draw(params, [7], 30))
    assert torch.equal(together[:, [2, 0]], draw(params, [9, 4], 30))


def test_certain_token_is_drawn_whatever_the_race() -> None:
    logits = torch.full((200, 8), -torch.inf)
    logits[:, 5] = 0.0
    noise = exponential_noise(torch.arange(200), torch.zeros(200, dtype=torch.int64), 8)
    assert set(sampled_tokens(logits, SamplingParams(1.0), noise).tolist()) == {5}


def test_certain_token_is_drawn_where_its_noise_is_the_largest_there_is() -> None:
    """Random bits that float32 rounds up to 2**32 come once in 33 million draws: here a place that has them."""
    key, step, token, width = 53, 5, 1004, 1024
    noise = exponential_noise(torch.tensor([key]), torch.tensor([step]), width)
    assert noise.argmax() == token
    assert noise[0, token] == pytest.approx(24 * math.log(2))
    logits = torch.full((1, width), -10.0)
    logits[0, token] = 50.0
    for params in (SamplingParams(1.0, top_k=1), SamplingParams(1.0, top_p=0.5), SamplingParams(0.1)):
        assert sampled_tokens(logits, params, noise).tolist() == [token]
        guessed, chances = sampled_guesses(logits, 1, params, noise)
        assert guessed.tolist() == [[token]]
        assert not chances.isnan().any()


def sample_steps(communicator: Communicator, logits: Tensor, params: SamplingParams) -> Tensor:
    """[step, batch] tokens from logits [step, batch, vocabulary]."""
    local, shards = local_part(logits, communicator)
    sample, keys = Sampler(params, shards, communicator), keys_of(params, range(logits.shape[1]))
    return torch.stack([sample(step, keys, torch.full_like(keys, at)) for at, step in enumerate(local)])


def test_all_ranks_draw_the_token_that_one_rank_alone_draws() -> None:
    logits = torch.randn(40, 6, 11, generator=torch.Generator().manual_seed(0))
    alone = run_on_ranks(sample_steps, 1, logits, SAMPLING)[0]
    assert len(set(alone.flatten().tolist())) > 5
    for world_size in (2, 3):
        for tokens in run_on_ranks(sample_steps, world_size, logits, SAMPLING):
            assert torch.equal(tokens, alone)


def sampled_answers(communicator: Communicator, folder: Path, batches: list[list[int]]) -> list[list[list[int]]]:
    """Token ids of the answers to batches of the model's prompts, given by their indices."""
    engine = make_engine(communicator, folder, prefill_chunk=16, batch_size=3, sampling=SAMPLING)
    prompts, answers = prompts_of("llama"), []
    for batch in batches:
        result = generate(engine, [Prompt(index, prompts[index]) for index in batch], demo_tokenizer(), StopRules(12))
        answers.append([answer.token_ids for answer in result.answers])
    return answers


@pytest.mark.parametrize("world_size", (1, 2))
def test_batch_mates_do_not_change_an_answer(folders: dict[str, Path], world_size: int) -> None:
    batches = [[0, 1, 2, 3], [0], [3], [2, 1]]
    for together, first, last, middle in run_on_ranks(sampled_answers, world_size, folders["llama"], batches):
        assert [*first, *last] == [together[0], together[3]]
        assert middle == [together[2], together[1]]
        assert len({tuple(tokens) for tokens in together}) == 4


def seeded_answers(communicator: Communicator, folder: Path, batches: list[list[Prompt]]) -> list[list[list[int]]]:
    engine = make_engine(communicator, folder, prefill_chunk=16, batch_size=3, sampling=SAMPLING)
    results = [generate(engine, batch, demo_tokenizer(), StopRules(12)) for batch in batches]
    return [[answer.token_ids for answer in result.answers] for result in results]


@pytest.mark.parametrize("world_size", (1, 2))
def test_a_prompt_with_a_seed_has_the_same_answer_at_any_place(folders: dict[str, Path], world_size: int) -> None:
    """That of the only prompt of a run by this seed; others keep the draws of their places."""
    first, second, third, _ = prompts_of("llama")
    batches = [
        [Prompt(0, first), Prompt(1, second, seed=9), Prompt(2, third), Prompt(3, second, seed=8)],
        [Prompt(0, first), Prompt(1, third), Prompt(2, first), Prompt(7, second, seed=9)],
        [Prompt(0, second, seed=9)],
        [Prompt(0, second, seed=SAMPLING.seed), Prompt(0, second), Prompt(1, second), Prompt(2, third)],
    ]
    for mixed, moved, alone, plain in run_on_ranks(seeded_answers, world_size, folders["llama"], batches):
        assert mixed[1] == moved[3] == alone[0]
        assert plain[0] == plain[1]
        assert mixed[2] == plain[3]
        assert len({tuple(tokens) for tokens in (mixed[1], mixed[3], plain[0], plain[2])}) == 4
