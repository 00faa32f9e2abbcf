"""Speculative decoding: the SLM drafts K tokens, the LLM verifies them in one forward over its cache.

Where it sits: in place of a step of decode.py, after the same prefill. The paper names it as what makes the SLM pay for
itself (appendix A.3): its forward passes are made anyway, and their attention rows drive the tiers. A round
(`RoundSession.forward`), one function and one CUDA graph as a step is:

    SLM: the newest token, then draft by draft     K + 1 steps; their attention rows wait              cache.Scores
    one plan for the round, rows move              from the rows of all tokens of the round            smallkv.py
    LLM: newest token and drafts, one forward      each draft borrows its own SLM row (Eq. 6)          kernels.py
    accept a prefix, add one token of the LLM      the rest lies beyond a sequence's length, unread

**When the plan is made, and from what**: once a round, when the rows of all drafts are there. A token's score is the
largest that it has after any token of the round (`scores.rank_scores`): what the third draft looks at is in place when
the LLM verifies it. The rows of a refused draft count in one plan and in no score. The drafts are critical while
they are verified; the accepted ones stay until the next plan, and no other token leaves before it.

**Sampling**: a draft d of the SLM's distribution q is accepted with probability min(1, p(d) / q(d)), p the LLM's; the
first one that is not is replaced by a draw from max(p - q, 0), normalised (arXiv 2211.17192). Greedy: a draft is
accepted if it is the LLM's choice. With the full cache the tokens are those of the LLM alone; SmallKV's p is that of an
LLM on the tiers of the round's plan.

What refused drafts leave behind lies beyond a sequence's length, where nothing reads it before it is overwritten. For
their places, and for sequences that have ended, the caches have room for K positions more.

Shapes follow the legend in model.py; T = K + 1 tokens of a round.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cache import Cache, FullCache
from decode import NotFinite, Policy, Sampler, Session, Timing, read_prompt
from model import Decoder, Span


def check_drafts(drafts: int) -> None:
    if drafts < 1:
        raise ValueError(f"{drafts} drafts a step are too few; at least 1, and 4 is usual")


class DraftedFull(Policy):
    """The full cache, with an SLM that drafts and has a full cache of its own."""

    def __init__(self, llm: Decoder, slm: Decoder, drafts: int):
        check_drafts(drafts)
        super().__init__(llm)
        self.slm, self.drafts, self.models = slm, drafts, [llm, slm]

    def make_caches(self, lengths: list[int], capacity: int, device) -> dict[str, Cache]:
        slm = FullCache(self.slm.config, len(lengths), capacity, device, self.slm.dtype)
        return {**super().make_caches(lengths, capacity, device), "SLM": slm}

    def allocate(self, lengths: list[int], capacity: int) -> None:
        super().allocate(lengths, capacity)
        self.slm_cache, self.allowed = self.caches["SLM"], None

    def prefill(self, b: int, tokens: Tensor, chunk: int, progress=None) -> Tensor:
        read_prompt(self.slm, tokens, self.slm_cache.staging(b, tokens.shape[1]), chunk, logits="scores")
        return super().prefill(b, tokens, chunk, progress)


# ---- Acceptance ------------------------------------------------------------------------------------------------------


def accept_greedy(drafts: Tensor, best: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafts are the LLM's own choice before the first that is not, and its choice after them: (B,) each.

    drafts (B, K). best (B, K + 1): the LLM's choice after the newest token and after every draft. allowed (B,): how
    many of a sequence's drafts count at all.
    """
    place = torch.arange(drafts.shape[1], device=drafts.device)
    own = (drafts == best[:, :-1]) & (place < allowed[:, None])
    count = own.long().cumprod(-1).sum(-1)
    return count, best.gather(1, count[:, None])[:, 0]


def accept_sampled(
    drafts: Tensor, believed: Tensor, wanted: Tensor, allowed: Tensor, chance: Tensor
) -> tuple[Tensor, Tensor]:
    """Acceptance-rejection (arXiv 2211.17192): how many drafts stay and the token after them, distributed as the LLM's.

    drafts (B, K), allowed (B,) as above. believed (B, K, V): what each draft was drawn from. wanted (B, K + 1, V): what
    the LLM would draw from at each draft and after them. chance (B, K + 1) uniform in [0, 1): one a draft, and one for
    the token after them.
    """
    p, q = (table.gather(-1, drafts[..., None])[..., 0] for table in (wanted[:, :-1], believed))  # (B, K)
    place, row = (torch.arange(size, device=drafts.device) for size in reversed(drafts.shape))
    stays = (chance[:, :-1] * q < p) & (place < allowed[:, None])
    count = stays.long().cumprod(-1).sum(-1)  # (B,)
    own = wanted[row, count]  # (B, V): where the next token comes from if no draft was refused
    refused = F.pad(believed, (0, 0, 0, 1))[row, count] * (count < allowed)[:, None]
    rest = (own - refused).clamp(min=0)
    rest = rest.where(rest.sum(-1, keepdim=True) > 0, own)  # p = q up to rounding: there was nothing to refuse
    return count, draw(rest, chance[:, -1])


def draw(distribution: Tensor, chance: Tensor) -> Tensor:
    """A token of each distribution (B, V), which need not sum to one, by a uniform number each: (B,)."""
    below = distribution.double().cumsum(-1)
    return torch.searchsorted(below, chance.double()[:, None] * below[:, -1:], right=True)[:, 0]


# ---- Rounds ----------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What speculation came to, over the sequences that had not ended: rounds, drafts made and accepted, new tokens."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0

    @property
    def acceptance(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_round(self) -> float | None:
        return self.tokens / self.rounds if self.rounds else None


class RoundSession(Session):
    """A session whose policy drafts (`DraftedFull`, or `SmallKV` with drafts): `round` in place of `step`.

    answer (B, T) and kept (B,) int32 on the device: the new tokens of the last round, the first kept of each sequence
    count; broken (B,) bool: logits were not finite. forced: accept drafts by this chance instead, whatever the models
    say, for a benchmark of random weights.
    """

    def __init__(
        self, policy: Policy, prompts: list[list[int]], max_new_tokens: int, sampler: Sampler = Sampler(),
        stop: set[int] = frozenset(), **options,
    ):  # fmt: skip
        check_drafts(policy.drafts)
        super().__init__(policy, prompts, max_new_tokens, spare=policy.drafts, **options)
        self.sampler, self.counts, self.forced = sampler, Counts(), None
        self.generators = sampler.generators(len(prompts))
        device, batch = self.length.device, len(prompts)
        self.stop = torch.tensor(sorted(stop), dtype=torch.long, device=device)
        self.allowed = torch.zeros(batch, dtype=torch.int32, device=device)  # drafts that count; -1: it has ended
        self.chance = torch.zeros(batch, 2 * policy.drafts + 1, device=device)

    @torch.inference_mode()
    def round(self, newest: list[int], allowed: list[int | None]) -> list[list[int]]:
        """newest: each sequence's last token, in no cache yet. allowed: how many drafts it takes; None: it has ended.

        Returns each sequence's new tokens, 1 to allowed + 1 of them, none of them after a stop token; the last one is
        in no cache yet. One that has ended gets none: it keeps its place, and what it has cached.
        """
        if max(self.lengths) + self.policy.drafts >= self.capacity:
            raise ValueError(f"no room for a round beyond the capacity of {self.capacity} positions")
        ended = [count is None for count in allowed]
        self.take(newest)
        self.tokens.copy_(torch.tensor(newest)[:, None])
        self.allowed.copy_(torch.tensor([-1 if count is None else count for count in allowed]))
        # As many numbers for each sequence in every round: what one draws does not depend on the others.
        self.chance.copy_(torch.stack([torch.rand(self.chance.shape[1], generator=g) for g in self.generators]))
        self.run()
        if self.broken.any():
            raise NotFinite
        answers = [row[:count] for row, count in zip(self.answer.tolist(), self.kept.tolist())]
        for b, answer in enumerate(answers):
            self.lengths[b] += len(answer)
            self.texts[b] += answer[:-1]
            del self.texts[b][self.lengths[b] :]  # of an ended one: its newest token, which `take` wrote again
            if not ended[b]:
                self.counts.rounds += 1
                self.counts.drafted += allowed[b]
                self.counts.accepted += len(answer) - 1
                self.counts.tokens += len(answer)
        return answers

    def forward(self) -> None:
        """The round: `tokens` (B, 1), `allowed` and `chance` in; `answer` and `kept` out, `length` kept longer."""
        policy, K, greedy = self.policy, self.policy.drafts, self.sampler.temperature == 0
        span, fed, believed = Span.step(self.length + 1, K + 1), [self.tokens], []
        sums = []  # of logits: NaN or infinite if one of them is
        for place in range(K + 1):
            policy.slm_cache.at = place
            last, words = Span.step(span.length + place), "last" if place < K else "scores"
            logits = policy.slm(fed[-1], last, policy.slm_cache, logits=words)
            if place == K:
                break
            logits = logits[:, 0, : self.vocab]
            sums.append(logits.sum(-1, dtype=torch.float32))
            if not greedy:
                believed.append(self.sampler.probabilities(logits))  # (B, V)
            fed.append((logits.argmax(-1) if greedy else draw(believed[-1], self.chance[:, place]))[:, None])
        tokens, allowed = torch.cat(fed, 1), self.allowed.clamp(min=0)  # (B, T)
        policy.allowed = allowed
        self.lanes.fork()
        logits = self.attend(tokens, span, [])  # (B, T, V)
        sums.append(logits.sum((1, 2), dtype=torch.float32))
        self.broken = ~torch.stack(sums).isfinite().all(0) & (self.allowed >= 0)
        if self.forced is not None:
            chosen = tokens[:, 1:].where(self.chance[:, K : 2 * K] < self.forced, -1)
            count, after = accept_greedy(chosen, F.pad(tokens[:, 1:], (0, 1)), allowed)
        elif greedy:
            count, after = accept_greedy(tokens[:, 1:], logits.argmax(-1), allowed)
        else:
            wanted = self.sampler.probabilities(logits)
            count, after = accept_sampled(tokens[:, 1:], torch.stack(believed, 1), wanted, allowed, self.chance[:, K:])
        place = torch.arange(K + 1, device=tokens.device)
        self.answer = F.pad(tokens[:, 1:], (0, 1)).where(place < count[:, None], after[:, None])
        ends = (self.answer[..., None] == self.stop).any(-1) & (place <= count[:, None])
        count = torch.minimum(count, (place + (K + 1) * ~ends).amin(-1))  # nothing after a stop token
        self.kept = (count + 1).where(self.allowed >= 0, 0).int()
        policy.settle(span, self.kept)
        self.length += self.kept


def speculate_ids(
    session: RoundSession, max_new_tokens: int, stop: set[int] = frozenset(), timing: Timing | None = None
) -> Iterator[list[list[int]]]:
    """Yield each round's new tokens of every sequence, the stop token too; none for a sequence that has ended.

    timing.per_token: seconds of a round over the tokens that a round gives a sequence that has not ended.
    """
    timing = timing if timing is not None else Timing()
    begin, spent = time.perf_counter(), 0.0
    new = [[token] for token in session.sampler(session.prefill(), session.generators)]
    timing.first_token = time.perf_counter() - begin
    newest, made = [0] * len(new), [0] * len(new)
    ended = [False] * len(new)
    while True:
        yield [list(tokens) for tokens in new]
        for b, tokens in enumerate(new):
            if tokens:
                newest[b] = tokens[-1]
                made[b] += len(tokens)
                ended[b] = tokens[-1] in stop or made[b] == max_new_tokens
        if all(ended):
            return
        drafts = session.policy.drafts
        allowed = [None if done else min(drafts, max_new_tokens - count - 1) for done, count in zip(ended, made)]
        begin = time.perf_counter()
        new = session.round(newest, allowed)
        spent += time.perf_counter() - begin
        timing.steps += 1
        timing.per_token = spent / timing.steps / session.counts.tokens_per_round


def generate(
    policy: Policy, prompts: list[list[int]], max_new_tokens: int, stop: set[int] = frozenset(),
    sampler: Sampler = Sampler(),
) -> list[list[int]]:  # fmt: skip
    """All answers at once, as token ids without the stop token: `decode.generate` for a policy that drafts."""
    answers: list[list[int]] = [[] for _ in prompts]
    session = RoundSession(policy, prompts, max_new_tokens, sampler, stop)
    for tokens in speculate_ids(session, max_new_tokens, stop):
        for answer, new in zip(answers, tokens):
            answer += [token for token in new if token not in stop]
    return answers
