"""Prefill, the decode loop, sampling: how a batch of prompts becomes tokens.

Where it sits: it owns the order of things. A decode step, the whole project in a few lines (`Session.step`):

    policy.observe(tokens, span)            # one SLM step: attention rows -> scores (smallkv.py)
    cache.migrate(policy.plan, span)        # tier plan per layer -> rows move (cache.py)
    logits = llm(tokens, span, cache)       # attention on the tiers (kernels.py)
    tokens = sampler(logits)                # and round again

A policy is an object with `models`, `whole_prompt`, `make_cache`, `predict`, `prefill`, `observe` and `plan`;
`FullPolicy` is the smallest one.
Shapes follow the legend in model.py.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from full_cache import FullCache
from int8_rows import check_prompts
from model import Decoder, Span

PREFILL_CHUNK = 1024  # tokens of a prompt that go through a model at once: bounds activations, not results


class FullPolicy:
    """The full cache: nothing to observe, nothing to plan."""

    name = "full"
    whole_prompt = False  # a prompt may be prefilled in chunks

    def __init__(self, llm: Decoder, int8: bool = False):
        """int8: K and V in 8 bits (int8_rows.py), a rival in bench.py."""
        self.llm, self.models, self.int8 = llm, [llm], int8

    def make_cache(self, lengths: list[int], capacity: int) -> FullCache:
        if self.int8:
            check_prompts("full cache", lengths)
        self.cache = FullCache(self.llm.config, len(lengths), capacity, self.llm.device, self.llm.dtype, self.int8)
        return self.cache

    def predict(self, lengths: list[int], capacity: int) -> dict[str, list]:
        config, device = self.llm.config, self.llm.device.type
        return {"LLM": FullCache.predict(config, len(lengths), capacity, device, self.llm.dtype, self.int8)}

    def prefill(
        self, b: int, prompts: list[list[int]], ids: list[Tensor], chunks: list[tuple[int, int]]
    ) -> Callable | None:
        """Called before the LLM's prefill of sequence b; an SLM is run here.

        prompts of all sequences, and their ids (n,) on the LLM's device. chunks: (start, end) of the parts in which the
        LLM will take that of b.
        What is returned, if anything, is shown the LLM's queries and keys: the `observe` of `Decoder.forward`.
        """

    def observe(self, tokens: list[int], span: Span) -> None:
        pass

    def plan(self, layer: int) -> None:
        return None


def strip_pads(padded: Tensor, mask: Tensor) -> list[list[int]]:
    """Left-padded tokens (B, T) and attention mask (B, T), as tokenizers give them, to lists of token ids.

    A batch is never padded inside the models: each prompt is prefilled alone, and token j of a sequence is at index j
    of its cache, so no pad can be attended to, scored or kept. ValueError if a pad stands anywhere but on the left.
    """
    lengths = mask.sum(-1)
    tail = torch.arange(mask.shape[1], device=mask.device) >= mask.shape[1] - lengths[:, None]
    if not torch.equal(tail, mask.bool()):
        raise ValueError("a batch must be padded on the left: the attention mask has a 0 after a 1")
    return [row[len(row) - n :].tolist() for row, n in zip(padded, lengths.tolist())]


def check_positions(policy, lengths: list[int], max_new_tokens: int) -> None:
    """ValueError if the longest prompt and its answer do not fit the positions of the models."""
    total, limit = max(lengths) + max_new_tokens, min(model.config.max_positions for model in policy.models)
    if total > limit:
        raise ValueError(
            f"prompt of {max(lengths)} tokens plus {max_new_tokens} new ones is {total}, longer than the {limit} "
            "positions of the model; shorten the prompt or lower --max-new-tokens"
        )


class Session:
    """A batch of sequences being decoded by one LLM under one policy."""

    def __init__(
        self, llm: Decoder, policy, prompts: list[list[int]], max_new_tokens: int, chunk: int = PREFILL_CHUNK,
        progress: Callable[[int], None] | None = None, spare: int = 0,
    ):  # fmt: skip
        """prompts: token ids, one list a sequence. max_new_tokens: the caches are made for that many more, and `spare`.

        progress is called with the number of prompt tokens that both models have been given, chunk by chunk; a GPU may
        be some kernels behind.
        """
        if not prompts or any(not prompt for prompt in prompts):
            raise ValueError("empty prompt: there is nothing to continue")
        self.llm, self.policy, self.prompts, self.chunk, self.progress = llm, policy, prompts, chunk, progress
        self.lengths = [len(prompt) for prompt in prompts]
        self.capacity = max(self.lengths) + max_new_tokens + spare
        check_positions(policy, self.lengths, max_new_tokens)
        # Ids that only padding rows of the larger embedding have mean nothing, and the SLM could not read them.
        self.vocab = min(model.config.vocab_size for model in policy.models)
        self.cache = policy.make_cache(self.lengths, self.capacity)

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        """Both models over every prompt, one sequence at a time, in chunks; logits (B, V) of the last tokens.

        Nothing in the loop waits for the device: it launches the SLM's small kernels while the LLM's large ones of the
        prompt before are still running. So the ids are there before it; a copy to the device would wait.
        """
        logits = []
        ids = torch.cat([torch.tensor(prompt) for prompt in self.prompts]).to(self.llm.device).split(self.lengths)
        for b, prompt in enumerate(self.prompts):
            chunk = len(prompt) if self.policy.whole_prompt else self.chunk
            chunks = [(start, min(start + chunk, len(prompt))) for start in range(0, len(prompt), chunk)]
            tokens = ids[b][None]  # (1, n)
            observe = self.policy.prefill(b, self.prompts, ids, chunks)
            staged = self.cache.staging(b, len(prompt))
            for start, end in chunks:
                span = Span.block(start, end, tokens.device)
                last = self.llm(tokens[:, start:end], span, staged, logits="last", observe=observe)  # (1, 1, V)
                if self.progress:
                    self.progress(end - start)
            self.cache.load(b, staged, len(prompt))
            logits.append(last[:, 0, : self.vocab])
        return torch.cat(logits)

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> Tensor:
        """One token for each sequence through SLM, plan, migration and LLM; logits (B, V) of what comes next."""
        span = Span.step(self.lengths, self.llm.device)
        self.policy.observe(tokens, span)
        self.cache.migrate(self.policy.plan, span)
        ids = torch.tensor(tokens, device=self.llm.device)[:, None]  # (B, 1)
        logits = self.llm(ids, span, self.cache, logits="last")[:, 0, : self.vocab]
        self.lengths = [length + 1 for length in self.lengths]
        return logits


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen. temperature 0 is greedy. top_k 0 and top_p 1 keep the whole vocabulary."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature != 0 and not 1e-4 <= self.temperature <= 1e4:
            raise ValueError(f"temperature {self.temperature} is not 0 (greedy) nor between 0.0001 and 10000")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is outside [0, 2^63)")
        if self.top_k < 0:
            raise ValueError(f"top-k {self.top_k} is negative; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p {self.top_p} is outside (0, 1]; 1 keeps every token")

    def generators(self, batch: int) -> list[torch.Generator]:
        """One source of randomness a sequence, seeded alike: a prompt's answer does not depend on its neighbours."""
        return [torch.Generator().manual_seed(self.seed) for _ in range(batch)]

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits (..., V) -> the distributions that are drawn from, (..., V) fp32."""
        scaled = logits.float() / self.temperature
        if self.top_k:
            least = scaled.topk(min(self.top_k, scaled.shape[-1])).values[..., -1:]
            scaled = scaled.masked_fill(scaled < least, -torch.inf)
        if self.top_p < 1:
            ordered, order = scaled.softmax(-1).sort(descending=True)
            before = ordered.cumsum(-1) - ordered  # mass of the more likely tokens: the first one always stays
            unlikely = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= self.top_p)
            scaled = scaled.masked_fill(unlikely, -torch.inf)
        return scaled.softmax(-1)

    def __call__(self, logits: Tensor, generators: list[torch.Generator]) -> list[int]:
        """logits (B, V) -> one token id a sequence."""
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        rows = logits.cpu()
        return [torch.multinomial(self.probabilities(row), 1, generator=g).item() for row, g in zip(rows, generators)]


@dataclass
class Timing:
    """Seconds, measured on the host around work that ends on the host (the sampled token)."""

    first_token: float | None = None  # TTFT: prefill of the whole batch and the first token; None before there is one
    per_token: float = 0.0  # TPOT: mean over the decode steps
    steps: int = 0


def generate_ids(
    session: Session, sampler: Sampler, max_new_tokens: int, stop: set[int] = frozenset(), timing: Timing | None = None
) -> Iterator[list[int | None]]:
    """Yield each step's tokens, one a sequence, the stop token too; None for a sequence that has ended."""
    timing = timing if timing is not None else Timing()
    begin = time.perf_counter()
    generators = sampler.generators(len(session.prompts))
    tokens = sampler(session.prefill(), generators)
    timing.first_token = time.perf_counter() - begin
    ended = [False] * len(tokens)
    spent = 0.0
    for made in range(1, max_new_tokens + 1):
        yield [None if done else token for token, done in zip(tokens, ended)]
        ended = [done or token in stop for token, done in zip(tokens, ended)]
        if all(ended) or made == max_new_tokens:
            return
        begin = time.perf_counter()
        tokens = sampler(session.step(tokens), generators)
        spent += time.perf_counter() - begin
        timing.steps += 1
        timing.per_token = spent / timing.steps


def generate(
    llm: Decoder, policy, prompts: list[list[int]], max_new_tokens: int, stop: set[int] = frozenset(),
    sampler: Sampler = Sampler(),
) -> list[list[int]]:  # fmt: skip
    """All answers at once, as token ids without the stop token."""
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens in generate_ids(Session(llm, policy, prompts, max_new_tokens), sampler, max_new_tokens, stop):
        for answer, token in zip(answers, tokens):
            if token is not None and token not in stop:
                answer.append(token)
    return answers
