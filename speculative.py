"""Speculative decoding: the SLM drafts K tokens, the LLM verifies them in one forward over its cache.

Where it sits: in place of `Session.step` and `decode.generate_ids` (decode.py), after the same prefill. The paper names
it as what makes the SLM pay for itself (appendix A.3): its forward passes are made anyway, and their attention rows
drive the tiers. A round, `SpeculativeSession.round`:

    SLM: the newest token, then draft by draft      K + 1 steps; their attention rows wait             drafts.py
    one plan for the round, rows move               from the rows of all tokens of the round           smallkv.py
    LLM: newest token and drafts, one forward       each draft borrows its own SLM row (Eq. 6)         kernels.py
    accept a prefix, add one token of the LLM       the rest leaves no trace in any cache              drafts.py

**When the plan is made, and from what**: once a round, when the SLM has made its drafts and the rows of all of them are
there. A token's score is the largest that it has after any token of the round (`Waiting.foreseen`): what the third
draft looks at is in place when the LLM verifies it. From the newest token's row alone, three of the demonstration's
four answers were lost. A draft that is refused has had its say in one plan, and in no score. The drafts are critical
while they are verified, the accepted ones stay until the next plan, and nobody leaves before it. This is what
`Settings.refresh` does between two plans, so a greedy answer is that of SmallKV without drafts whose refresh is K + 1
and whose plans are made at the tokens where rounds begin, from the scores that the SLM foresees there.

**Sampling**: a draft d of the SLM's distribution q is accepted with probability min(1, p(d) / q(d)), p the LLM's; the
first one that is not is replaced by a draw from max(p - q, 0), normalised (arXiv 2211.17192). The tokens are then
distributed as p, temperature, top-k and top-p applied to both. Greedy: a draft is accepted if it is the LLM's choice.
The full cache's p knows nothing of the drafts, and the tokens are those of the LLM alone. SmallKV's p is that of an LLM
on the tiers of the round's plan, which has seen the drafts' rows: exact for each plan, and a mixture over the plans.

A sequence never depends on its neighbours: where others draft more, its last places are filled with a token that is
never accepted. For these places, and for sequences that have ended, the caches have room for K positions more.

Shapes follow the legend in model.py; T = K + 1 tokens of a round.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cache import TierPlan
from decode import FullPolicy, Sampler, Session, Timing
from drafts import DraftedFrugal, DraftedScores, DraftedTiers
from frugal import kept_tokens
from full_cache import Entry, FullCache
from kernels import column_sums
from model import Decoder, Span
from settings import Settings
from smallkv import SmallKV


def check_drafts(drafts: int) -> None:
    if drafts < 1:
        raise ValueError(f"{drafts} drafts a step are too few; at least 1, and 4 is usual")


# ---- Policies --------------------------------------------------------------------------------------------------------


class SpeculativeFull(FullPolicy):
    """The full cache, with an SLM that drafts and has a full cache of its own."""

    def __init__(self, llm: Decoder, slm: Decoder, drafts: int):
        check_drafts(drafts)
        super().__init__(llm)
        self.slm, self.drafts, self.models = slm, drafts, [llm, slm]

    def make_cache(self, lengths: list[int], capacity: int) -> FullCache:
        self.slm_cache = FullCache(self.slm.config, len(lengths), capacity, self.slm.device, self.slm.dtype)
        return super().make_cache(lengths, capacity)

    def predict(self, lengths: list[int], capacity: int) -> dict[str, list[Entry]]:
        shape = self.slm.config, len(lengths), capacity, self.slm.device.type, self.slm.dtype
        return {**super().predict(lengths, capacity), "SLM": FullCache.predict(*shape)}

    def prefill(self, b: int, prompts, ids, chunks) -> None:
        tokens = ids[b][None].to(self.slm.device)  # (1, n)
        staged = self.slm_cache.staging(b, len(prompts[b]))
        for start, end in chunks:
            self.slm(tokens[:, start:end], Span.block(start, end, tokens.device), staged, logits="none")

    def draft(self, tokens: list[int], span: Span, place: int, words: bool) -> Tensor | None:
        """One SLM step: the newest tokens at place 0, then drafts; logits (B, V') of what comes next if words."""
        ids = torch.tensor(tokens, device=self.slm.device)[:, None]  # (B, 1)
        out = self.slm(ids, span, self.slm_cache, logits="last" if words else "none")
        return out[:, 0] if words else None

    def foresee(self, allowed: Tensor) -> None:
        """Nothing to plan."""

    def keep(self, fed: list[list[int]], kept: list[int]) -> None:
        """End the round: what lies beyond a sequence's length in a full cache is never seen."""


class SpeculativeSmallKV(SmallKV):
    """SmallKV in rounds: what its `observe` does for one token, for the newest token and its drafts."""

    def __init__(
        self, llm: Decoder, slm: Decoder, settings: Settings, drafts: int, head_map: Tensor | None = None,
        sums: Callable = column_sums,
    ):  # fmt: skip
        check_drafts(drafts)
        if settings.refresh != 1:
            raise ValueError(f"a plan every {settings.refresh} steps: with drafts there is one a round; leave it out")
        if not settings.saliency_shift:
            raise ValueError("drafts need saliency shift: without it the tiers follow weights of tokens not yet kept")
        if settings.fused:
            raise ValueError("drafts need scores slm: fused ones take in weights of tokens not yet kept")
        if settings.slm_int8:
            raise ValueError("slm-kv int8 goes without drafts: an SLM that writes reads its own K and V exact")
        super().__init__(llm, slm, replace(settings, refresh=drafts + 1), head_map, sums)
        self.drafts, self.keep_row = drafts, False  # the waiting rows are what marginal tokens are lent
        self.tiers = partial(DraftedTiers, drafts)
        self.scored, self.frugal = partial(DraftedScores, drafts), partial(DraftedFrugal, drafts)

    def predict(self, lengths: list[int], capacity: int) -> dict[str, list[Entry]]:
        """SmallKV's, with the rows that wait and the K and V of a whole round."""
        ledgers, llm, slm = super().predict(lengths, capacity), self.llm.config, self.slm.config
        share, device = self.settings.slm_budget, self.llm.device.type
        columns = capacity if share == 1 else kept_tokens(share, capacity) + self.drafts
        rows = slm.layers * len(lengths) * slm.query_heads * (self.drafts + 1) * columns * torch.float32.itemsize
        number = 1 if self.settings.llm_int8 else self.llm.dtype.itemsize
        more = 2 * llm.layers * len(lengths) * llm.kv_heads * llm.head_dim * self.drafts * number
        tables = "slot tables, newest K, V"
        tiers = [Entry(e.what, e.device, e.size + more * (e.what == tables)) for e in ledgers["LLM"]]
        return {"LLM": tiers, "SLM": ledgers["SLM"] + [Entry("rows of drafts", device, rows)]}

    def draft(self, tokens: list[int], span: Span, place: int, words: bool) -> Tensor | None:
        """One SLM step: the newest tokens at place 0, then drafts; logits (B, V') of what comes next if words."""
        self.slm_cache.begin(plans=place == 0)
        self.slm_cache.at = place
        ids = torch.tensor(tokens, device=self.slm.device)[:, None]  # (B, 1)
        out = self.slm(ids, span, self.slm_cache, logits="last" if words else "none")
        if place == 0:
            self.begin(tokens)
        self.place, self.end = place, span.end
        return out[:, 0] if words else None

    def begin(self, newest: list[int]) -> None:
        """A round begins: its newest tokens are sure to stay."""
        self._append([[token] for token in newest])
        self.sizes = [self.settings.planned(length) for length in self.lengths]
        self.steps += 1

    def _append(self, tokens: list[list[int]]) -> None:
        """One by one: a sequence that reaches the matching window is matched on what it was then."""
        for b, new in enumerate(tokens):
            for token in new:
                self.tokens[b].append(token)
                self.lengths[b] += 1
                self._match(b)

    def plan(self, layer: int) -> TierPlan:
        """The tiers by the foreseen scores, the drafts after the newest tokens critical; borrowed (B, H * T, n)."""
        critical, marginal = self._choose(layer)
        token = torch.arange(self.end, device=critical.device)
        first = torch.tensor(self.lengths, device=critical.device)[:, None, None]  # (B, 1, 1), of the drafts
        critical = critical | (token >= first) & (token < first + self.place)
        if not self.settings.marginal:
            return TierPlan(critical, marginal, None)
        rows = self._matched(self.slm_cache.rows[:, :, :, : self.place + 1], layer)  # (B, H, T, n)
        return TierPlan(critical, marginal, rows.flatten(1, 2))

    def foresee(self, allowed: Tensor) -> None:
        """The drafts are made: what the round is planned by, of each sequence's newest token and allowed[b] drafts."""
        self.foreseen = self.slm_cache.foreseen(allowed.to(self.slm.device))

    def _ranking(self, layer: int) -> Tensor:
        """The scores that the whole round foresees, those of its waiting rows among them: (B, G, n)."""
        return self._by_kv_head(self._matched(self.foreseen, layer))

    def keep(self, fed: list[list[int]], kept: list[int]) -> None:
        """End the round: of each sequence's tokens fed[b] the first kept[b] count; 0 if it has ended."""
        positions = [length - 1 for length in self.lengths]
        self.slm_cache.keep(positions, kept)
        self.cache.keep(positions, kept)
        self.settle(fed, kept)

    def settle(self, fed: list[list[int]], kept: list[int]) -> None:
        """`keep` without the caches: the texts, on which heads are matched."""
        for b, count in enumerate(kept):
            if count == 0:
                self.tokens[b].pop()
                self.lengths[b] -= 1
        self._append([tokens[1:count] for tokens, count in zip(fed, kept)])


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


class SpeculativeSession(Session):
    """A session whose policy drafts: `round` in place of `step`."""

    def __init__(self, llm: Decoder, policy, prompts: list[list[int]], max_new_tokens: int, **options):
        super().__init__(llm, policy, prompts, max_new_tokens, spare=policy.drafts, **options)
        self.counts = Counts()
        self.begun: list[list[int]] = []  # lengths before every round: where plans are made

    @torch.inference_mode()
    def round(
        self, newest: list[int], allowed: list[int | None], sampler: Sampler, generators: list[torch.Generator],
        stop: set[int] = frozenset(),
    ) -> list[list[int]]:  # fmt: skip
        """newest: each sequence's last token, in no cache yet. allowed: how many drafts it takes; None: it has ended.

        Returns each sequence's new tokens, 1 to allowed + 1 of them, none of them after a stop token; the last one is
        in no cache yet. One that has ended gets none: it keeps its place, and what it has cached.
        """
        drafts, device = self.policy.drafts, self.llm.device
        limits = torch.tensor([count or 0 for count in allowed])
        chance = self.chances(generators)
        greedy, places = sampler.temperature == 0, int(limits.max())
        self.begun.append(list(self.lengths))
        fed, believed = [newest], []
        for place in range(places + 1):
            span = Span.step([n + place for n in self.lengths], device)
            logits = self.policy.draft(fed[-1], span, place, words=place < places)
            if place < places and greedy:
                fed.append(logits[:, : self.vocab].argmax(-1).tolist())
            elif place < places:
                believed.append(sampler.probabilities(logits[:, : self.vocab].cpu()))  # (B, V)
                fed.append(draw(believed[-1], chance[:, place]).tolist())
        self.policy.foresee(limits)
        span = Span.step(self.lengths, device, places + 1)
        self.cache.migrate(self.policy.plan, span)
        tokens = torch.tensor(fed).T  # (B, T)
        logits = self.llm(tokens.to(device), span, self.cache)[..., : self.vocab]  # (B, T, V)
        if greedy:
            counts, after = accept_greedy(tokens[:, 1:], logits.argmax(-1).cpu(), limits)
        else:
            wanted = sampler.probabilities(logits.cpu())
            believed = torch.stack(believed, 1) if believed else wanted[:, :0]
            left = torch.cat((chance[:, drafts : drafts + places], chance[:, -1:]), 1)  # (B, T)
            counts, after = accept_sampled(tokens[:, 1:], believed, wanted, limits, left)
        rows, given = tokens.tolist(), zip(counts.tolist(), after.tolist())
        answers = [[*row[1 : count + 1], token] for row, (count, token) in zip(rows, given)]
        for answer, count in zip(answers, allowed):
            ends = [i for i, token in enumerate(answer) if token in stop]
            del answer[0 if count is None else min(ends, default=len(answer)) + 1 :]
        kept = [len(answer) for answer in answers]  # the newest token and the accepted drafts
        self.policy.keep(rows, kept)
        self._count(allowed, kept)
        return answers

    def chances(self, generators: list[torch.Generator]) -> Tensor:
        """Uniform numbers for a round (B, 2K + 1): of each draft, of its acceptance, and of the token after them.

        As many for each sequence in every round: what one draws does not depend on the others.
        """
        return torch.stack([torch.rand(2 * self.policy.drafts + 1, generator=generator) for generator in generators])

    def _count(self, allowed: list[int | None], kept: list[int]) -> None:
        self.lengths = [n + count for n, count in zip(self.lengths, kept)]
        for count, new in zip(allowed, kept):
            if count is not None:
                self.counts.rounds += 1
                self.counts.drafted += count
                self.counts.accepted += new - 1
                self.counts.tokens += new


def speculate_ids(
    session: SpeculativeSession, sampler: Sampler, max_new_tokens: int, stop: set[int] = frozenset(),
    timing: Timing | None = None,
) -> Iterator[list[list[int]]]:  # fmt: skip
    """Yield each round's new tokens of every sequence, the stop token too; none for a sequence that has ended.

    timing.per_token: seconds of a round over the tokens that a round gives a sequence that has not ended.
    """
    timing = timing if timing is not None else Timing()
    begin, spent = time.perf_counter(), 0.0
    generators = sampler.generators(len(session.prompts))
    new = [[token] for token in sampler(session.prefill(), generators)]
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
        new = session.round(newest, allowed, sampler, generators, stop)
        spent += time.perf_counter() - begin
        timing.steps += 1
        timing.per_token = spent / timing.steps / session.counts.tokens_per_round


def generate(
    llm: Decoder, policy, prompts: list[list[int]], max_new_tokens: int, stop: set[int] = frozenset(),
    sampler: Sampler = Sampler(),
) -> list[list[int]]:  # fmt: skip
    """All answers at once, as token ids without the stop token: `decode.generate` for a policy that drafts."""
    answers: list[list[int]] = [[] for _ in prompts]
    session = SpeculativeSession(llm, policy, prompts, max_new_tokens)
    for tokens in speculate_ids(session, sampler, max_new_tokens, stop):
        for answer, new in zip(answers, tokens):
            answer += [token for token in new if token not in stop]
    return answers
