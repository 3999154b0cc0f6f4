"""Generation: prompts to answers, many at a time, the host one pass behind the device, or right at it (look_first)."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from parallel.engine.answer import Answer, Opened, RequestTimes, StopRules
from parallel.engine.arrivals import Agree, Arrivals, alone
from parallel.engine.engine import Engine
from parallel.engine.pending import Pending, check_number
from parallel.engine.scheduler import Scheduler
from parallel.engine.sequence import Part, TokenSequence
from parallel.engine.speculation.acceptance import Acceptance
from parallel.engine.speculation.given import Given
from parallel.engine.speculation.tree_plan import TreePlan
from parallel.engine.text import TextStream


@dataclass(frozen=True)
class Listener:
    """What is told how answers come on.

    `on_text`: (row, text) as soon as text of a prompt's answer may be shown; `on_prefill`: the tokens of prompts that
    are done, and all of them; `on_answer`: (row, answer) when one has ended.
    """

    on_text: Callable[[int, str], None] = lambda row, text: None
    on_prefill: Callable[[int, int], None] = lambda done, total: None
    on_answer: Callable[[int, Answer], None] = lambda row, answer: None


SILENT = Listener()


@dataclass(frozen=True)
class Prompt:
    """Token ids, the index that seeds the answer's draws unless it has a seed of its own, and the seconds after the
    start at which the prompt comes."""

    index: int
    token_ids: list[int]
    arrival_sec: float | None = None
    seed: int | None = None


@dataclass
class Result:
    """Answers in prompt order.

    `ttft_ms`: from each prompt's arrival (or its admission, where it has no time) to its first token on the host.
    `step_ms`: of each decode step, from the tokens before to its own on the host, with what was prefilled between them.
    `token_ms`: of each token of each answer but its first, from the one before it on the host, divided among the tokens
    that the answer got in the step: without speculation all of it. `requests`: as answers end.
    Of `prompt_tokens` in all, `reused_tokens` were found in the cache. `acceptance` is of drafts; `plans`: for how many
    steps each tree was chosen, where they are chosen step by step.
    """

    answers: list[Answer]
    ttft_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    token_ms: list[float] = field(default_factory=list)
    requests: list[RequestTimes] = field(default_factory=list)
    prompt_tokens: int = 0
    reused_tokens: int = 0
    acceptance: Acceptance = field(default_factory=Acceptance)
    plans: Counter[TreePlan] = field(default_factory=Counter)


def generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    rules: StopRules,
    listener: Listener = SILENT,
    *,
    agree: Agree = alone,
) -> Result:
    """Answers `prompts`, as many at a time as the engine has rows.

    Prompts with an `arrival_sec` wait for it; either all have one, in ascending order, or none.

    Args:
        agree: how ranks agree on which prompts have come, where they come over time.

    Whatever is raised under way, an interrupt too, leaves the engine without sequences and with all its pages.

    Raises:
        ValueError: a prompt is empty or does not leave room for one token of answer.
        ModelError: after a prompt the model gives no numbers.
    """
    check_lengths(prompts, engine.limits.max_context)
    run = Generation(engine, prompts, tokenizer, rules, listener, agree)
    try:
        while run.go_on():
            pass
    except BaseException:
        engine.reset()
        raise
    return run.result


def check_lengths(prompts: Sequence[Prompt], max_context: int) -> None:
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.token_ids:
            raise ValueError(f"prompt {number} of {len(prompts)} has no tokens.")
        if len(prompt.token_ids) >= max_context:
            raise ValueError(
                f"a prompt of {len(prompt.token_ids)} tokens leaves no room in engine.max_context={max_context}. "
                "Raise engine.max_context or shorten the prompt."
            )


class Generation:
    """One call of `generate`: a pass is queued on the device, then the tokens of the one before are looked at."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        rules: StopRules,
        listener: Listener,
        agree: Agree,
    ) -> None:
        self.engine, self.rules, self.listener = engine, rules, listener
        self.opened: dict[TokenSequence, Opened] = {}
        for row, prompt in enumerate(prompts):
            room = engine.limits.max_context - len(prompt.token_ids)
            sequence = TokenSequence(prompt.index, prompt.token_ids, min(rules.max_tokens, room), prompt.seed)
            self.opened[sequence] = Opened(row, Answer(), TextStream(tokenizer, rules.texts), room)
        self.result = Result([each.answer for each in self.opened.values()])
        self.sequences = list(self.opened)
        times = [prompt.arrival_sec for prompt in prompts if prompt.arrival_sec is not None]
        assert len(times) in (0, len(prompts)), "either all prompts come at a time or none"
        self.scheduler = Scheduler(engine, () if times else self.sequences)
        self.arrivals = Arrivals(times, agree)
        self.pending: deque[Pending] = deque()
        self.last_arrival = 0.0
        self.prefilled_tokens, self.all_prompt_tokens = 0, sum(len(prompt.token_ids) for prompt in prompts)

    def go_on(self) -> bool:
        """Queues what comes next and takes what has arrived, but for the newest; False once nothing is left."""
        self.look_first()
        queued = self.queue()
        while self.pending and (len(self.pending) > 1 or not queued):
            self.take(self.pending.popleft())
        return queued or bool(self.pending) or not self.arrivals.all_taken

    def queue(self) -> bool:
        """Queues a chunk of prompts and a step, where there is something for them to do."""
        self.take_arrivals()
        now = time.perf_counter()
        for sequence in self.scheduler.admit():
            opened = self.opened[sequence]
            opened.since = now if opened.since is None else opened.since
            self.result.prompt_tokens += len(sequence.prompt)
            self.result.reused_tokens += sequence.num_reused
            self.prefilled_tokens += sequence.num_reused
        parts = self.scheduler.next_parts()
        if parts:
            self.prefill(parts)
            self.look_first()
        running = list(self.scheduler.running)
        if running:
            given = self.engine.step(running)
            self.pending.append(Pending.fetch(running, given, is_step=True, plan=self.engine.plan))
            self.scheduler.retire_sampled()
        return bool(parts or running)

    def look_first(self) -> None:
        """Takes all tokens before what is queued next, where the engine says so."""
        while self.pending and self.engine.looks_first:
            self.take(self.pending.popleft())

    def take_arrivals(self) -> None:
        """Lets in the prompts that have come, and waits for the next where there is nothing else to do."""
        for place in self.arrivals.take(wait=self.scheduler.is_idle and not self.pending):
            sequence = self.sequences[place]
            self.opened[sequence].since = self.arrivals.times[place]
            self.scheduler.add([sequence])

    def prefill(self, parts: Sequence[Part]) -> None:
        logits = self.engine.prefill(parts)
        started = self.scheduler.start_running()
        if started:
            first_tokens = self.engine.start_answers(started, logits)
            self.pending.append(Pending.fetch(started, first_tokens, is_step=False))
        self.engine.prefill_drafts(parts)
        self.scheduler.retire_sampled()
        self.prefilled_tokens += sum(len(part) for part in parts)
        self.listener.on_prefill(self.prefilled_tokens, self.all_prompt_tokens)

    def take(self, pending: Pending) -> None:
        """Waits for what a pass gave, and adds it to the answers."""
        arrived, now = pending.wait()
        # Before anyone believes these tokens.
        self.engine.sampler.communicator.check()
        if pending.is_step:
            self.result.step_ms.append((now - self.last_arrival) * 1e3)
            self.result.plans.update([pending.plan] if pending.plan else [])
        self.last_arrival = now
        for sequence, given in zip(pending.sequences, arrived, strict=True):
            check_number(sequence, given)
            # What was computed before the host saw that the answer had ended is dropped.
            if not self.opened[sequence].answer.has_ended:
                self.take_given(pending, sequence, given, now)

    def take_given(self, pending: Pending, sequence: TokenSequence, given: Given, now: float) -> None:
        """What one sequence got, and how long it has waited for that by `now`."""
        opened = self.opened[sequence]
        if not opened.answer.token_ids:
            assert opened.since is not None, "admitted before its first token"
            self.result.ttft_ms.append((now - opened.since) * 1e3)
            opened.first = now
        num_taken = self.take_tokens(sequence, opened, given)
        if pending.plan is not None:
            self.engine.learn(pending.plan, given.nodes)
        if pending.is_step:
            self.result.token_ms += [(now - opened.newest) * 1e3 / num_taken] * num_taken
        opened.newest = now
        if opened.answer.has_ended:
            self.result.requests.append(opened.times())

    def take_tokens(self, sequence: TokenSequence, opened: Opened, given: Given) -> int:
        """Adds tokens to an answer up to its end; returns how many."""
        # One was counted when the step was queued.
        sequence.num_sampled += len(given.tokens) - 1
        taken = 0
        for token in given.tokens:
            self.take_token(sequence, opened, token)
            taken += 1
            if opened.answer.has_ended:
                break
        if given.num_drafts is not None:
            self.result.acceptance.add(given.num_drafts, taken - 1)
        return taken

    def take_token(self, sequence: TokenSequence, opened: Opened, token: int) -> None:
        shown = opened.add(token, self.rules)
        if shown:
            self.listener.on_text(opened.row, shown)
        if opened.answer.has_ended:
            self.scheduler.retire(sequence)
            self.listener.on_answer(opened.row, opened.answer)
