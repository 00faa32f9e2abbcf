"""SmallKV (arXiv 2508.02751): the paper's method, from the SLM's attention to the tiers of the LLM's cache.

Where it sits: tokens -> SLM -> **scores -> tier plan** -> migration (cache.py) -> LLM -> token. Section 4 of the paper:

- saliency-shift compensation (Eq. 4-5): tokens are ranked by `a_f(i)`, the scores of the matched head of the SLM, which
  keeps its whole cache, so a token that was dropped can come back;
- marginal compensation (Eq. 6): the tokens ranked below the critical ones keep V alone, and borrow the SLM's attention.

Beyond the paper: the scores may forget (`score_decay`), because with a full SLM cache and a way back for every token
nothing forces the ranking to be about the past; and the LLM's own attention takes the SLM's place in them where it
sees a token (`scores="fused"`). Both are the default; `Settings.paper` gives the paper's accumulation.

Shapes follow the legend in model.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cache import TieredCache, TierPlan, column
from frugal import FrugalCache
from full_cache import ScoredCache
from int8_rows import check_prompts
from kernels import column_sums
from match import WINDOW_MAX, WINDOW_MIN, HeadMap, Window, layers_within, match_heads, match_windows
from model import Config, Decoder, Span
from settings import Settings, TierSizes


def recent_first(scores: Tensor, sizes: list[TierSizes], lengths: list[int]) -> Tensor:
    """Scores (B, G, n) with the newest token before all, then the recent ones, and what is not there yet last."""
    token, length = torch.arange(scores.shape[-1], device=scores.device), column(lengths, scores.device)
    recent = token >= length - column([size.recent for size in sizes], scores.device)
    scores = scores.masked_fill(recent, torch.finfo(scores.dtype).max).masked_fill(token == length - 1, torch.inf)
    return scores.masked_fill(token >= length, -torch.inf)


def plan_tiers(scores: Tensor, sizes: list[TierSizes], lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Rank the tokens and cut the ranking into tiers (Eq. 4, on scores that see every token).

    scores (B, G, n) fp32, sizes and lengths one for each sequence. Returns critical and marginal masks (B, G, n).
    Recent tokens rank first; equal scores rank by position, so that the outcome does not depend on the batch.
    """
    scores = recent_first(scores, sizes, lengths)
    critical = best(scores, [size.critical for size in sizes])
    if not any(size.marginal for size in sizes):
        return critical, torch.zeros_like(critical)
    covered = best(scores, [size.critical + size.marginal for size in sizes])
    return critical, covered & ~critical


def best(scores: Tensor, counts: list[int]) -> Tensor:
    """Mask (B, G, n): the counts[b] best tokens of each row of scores (B, G, n), equal ones by position."""
    n = scores.shape[-1]
    count = column(counts, scores.device).clamp(1, n)  # (B, 1, 1)
    top = scores.topk(min(max(counts), n)).values  # (B, G, most), largest first
    least = top.gather(-1, (count - 1).expand(*scores.shape[:2], 1))  # (B, G, 1), the last one that is in
    above, equal = scores > least, scores == least
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def ranks(scores: Tensor) -> Tensor:
    """How many of a row come before each token, the largest score first, equal ones by position: (B, G, n)."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    token = torch.arange(scores.shape[-1], device=scores.device)
    return torch.empty_like(order).scatter_(-1, order, token.expand_as(order))


def limit_moves(scores: Tensor, wanted: Tensor, held: Tensor, moves: int) -> Tensor:
    """The critical set (B, G, n) when only `moves` tokens may enter it, the newest not counted.

    scores as `recent_first` gives them. wanted (B, G, n): what the plan would have. held (B, G, C): positions of the
    tokens that are critical, -1 for an empty slot. Of the wanted that are not held the best enter; the best of those
    held keep the other places. `kernels_plan.plan_layers` does the same.
    """
    B, G, n = scores.shape
    inside = torch.zeros(B, G, n + 1, dtype=torch.bool, device=scores.device)
    inside = inside.scatter_(-1, held.long().where(held >= 0, n), True)[..., :n]
    coming = wanted & ~inside
    enter = coming & (ranks(scores.masked_fill(~coming, -torch.inf)) <= moves)
    places = wanted.sum(-1, keepdim=True) - enter.sum(-1, keepdim=True)
    return enter | (inside & (ranks(scores.masked_fill(~inside, -torch.inf)) < places))


def pool_slots(settings: Settings, shortest: int, capacity: int) -> tuple[int, int]:
    """Slots of the K pool and the V pool: the most that a plan at any length from `shortest` to `capacity` asks for,
    and the tokens that come before the next plan."""
    critical = held = 0
    kinds = (settings,) if settings.gate is None else (settings, settings.bare)
    for size in (kind.planned(length) for length in range(shortest, capacity + 1) for kind in kinds):
        critical, held = max(critical, size.critical), max(held, size.critical + size.marginal)
    return critical + settings.refresh - 1, held + settings.refresh - 1


class SmallKV:
    """The method for one batch: owns the SLM's cache, the head maps and the plan; the LLM's cache is the caller's.

    Per step (decode.py): `observe` runs the SLM on the newest tokens, then `plan` is asked for each layer of the LLM.
    """

    name = "smallkv"
    whole_prompt = False
    tiers, scored, frugal = TieredCache, ScoredCache, FrugalCache  # of the LLM, of the SLM, of an SLM with a budget

    def __init__(
        self, llm: Decoder, slm: Decoder, settings: Settings, head_map: Tensor | None = None,
        sums: Callable = column_sums,
    ):  # fmt: skip
        """head_map (L, H) int64 replaces the matching, for experiments and tests (ValueError if it passes the settings'
        reach). sums: see ScoredCache."""
        self.llm, self.slm, self.settings, self.given_map = llm, slm, settings, None
        if head_map is not None:
            self.given_map = head_map.to(llm.device)
            deepest = head_map.amax(1) // slm.config.query_heads
            if any(found >= near for found, near in zip(deepest.tolist(), self.needed)):
                raise ValueError(f"head map: its SLM layers {deepest.tolist()} are not all among the first "
                                 f"{self.needed} that reach {settings.reach} lets the LLM's layers have")  # fmt: skip
        self.models, self.sums = [llm, slm], sums
        self.keep_row = settings.marginal  # the SLM's newest row is lent to marginal tokens
        self.one_way = not settings.saliency_shift
        # The LLM's own attention on what it holds is remembered too, or not.
        self.own_decay = settings.score_decay if self.one_way or settings.fused else None

    @property
    def needed(self) -> list[int]:
        """How many of the SLM's layers, the first ones, each LLM layer's plan needs."""
        layers = self.llm.config.layers
        return [layers_within(self.settings.reach, n, layers, self.slm.config.layers) for n in range(layers)]

    @property
    def at_once(self) -> int:
        """Chunks of the LLM's that the SLM takes in one: no more than the LLM's activations."""
        return max(1, self.llm.config.intermediate_size // self.slm.config.intermediate_size)

    # -- before the first token --

    def make_cache(self, lengths: list[int], capacity: int) -> TieredCache:
        """Allocate the SLM's cache and the LLM's, for prompts of these lengths and `capacity` positions in all."""
        for name, rounded in (("llm-kv", self.settings.llm_int8), ("slm-kv", self.settings.slm_int8)):
            if rounded:
                check_prompts(name, lengths)
        batch, self.lengths = len(lengths), list(lengths)
        self.slm_cache = self.make_slm_cache(batch, capacity)
        self.maps: list[HeadMap | None] = [None] * batch
        self.tokens: list[list[int]] = [[] for _ in lengths]
        self.windows: dict[int, Window | None] = {}  # of sequences that the SLM has read and the LLM has not
        self.steps, self.kept = 0, {}  # layer -> the masks of the last plan, and who came since
        shape = (batch, self.llm.config.layers, self.llm.config.query_heads)
        self.index = torch.zeros(shape, dtype=torch.long, device=self.llm.device)  # f(i) of every sequence
        gates = (*shape[:2], self.llm.config.kv_heads)
        self.closed = torch.zeros(gates, dtype=torch.bool, device=self.llm.device)  # heads without a marginal tier
        slots = pool_slots(self.settings, min(lengths), capacity)
        self.cache = self.tiers(
            self.llm.config, batch, capacity, *slots, self.llm.device, self.llm.dtype, self.settings.prefetch,
            self.own_decay, self.one_way, self.sums, self.settings.llm_int8,
        )  # fmt: skip
        return self.cache

    def make_slm_cache(self, batch: int, capacity: int) -> ScoredCache:
        settings = self.settings
        shape = (self.slm.config, batch, capacity, self.slm.device, self.slm.dtype)
        scores = (settings.slm_decay, self.sums, self.keep_row)
        if settings.slm_budget < 1:
            return self.frugal(*shape, *scores, settings.slm_budget, settings.refresh)
        return self.scored(*shape, *scores, settings.slm_int8)

    def predict(self, lengths: list[int], capacity: int, static: bool = False) -> dict[str, list]:
        """Ledgers of both caches before anything is allocated. static: as graph.py's steps hold them; the prefill
        before them does as without it."""
        batch, device = len(lengths), self.llm.device.type
        slots = pool_slots(self.settings, min(lengths), capacity)
        llm: Config = self.llm.config
        shape = (self.slm.config, batch, capacity, device, self.slm.dtype, self.keep_row)
        share, refresh = self.settings.slm_budget, self.settings.refresh
        own = self.own_decay, self.one_way, self.settings.llm_int8
        if share < 1:
            slm = FrugalCache.predict(*shape, share, refresh, static)
        else:
            slm = ScoredCache.predict(*shape, static and self.settings.logits, self.settings.slm_int8)
        return {"LLM": TieredCache.predict(llm, batch, capacity, *slots, device, self.llm.dtype, *own), "SLM": slm}

    def prefill(
        self, b: int, prompts: list[list[int]], ids: list[Tensor], chunks: list[tuple[int, int]]
    ) -> Callable | None:
        """Run the SLM over the prompt of sequence b, if it has not come with one before; returns what matches the heads
        while the LLM does the same.

        prompts, and ids (n,) on the LLM's device: of all sequences. chunks: (start, end) of the LLM's. None is returned
        where there is nothing to match (`_score_prompts`).
        """
        if b not in self.windows:
            self._score_prompts(b, prompts, ids, chunks)
        slm_window = self.windows.pop(b)
        self.tokens[b] = list(prompts[b])
        if self.given_map is not None:
            self._take_map(b, HeadMap(self.given_map, torch.full_like(self.given_map, torch.nan, dtype=torch.float)))
        if slm_window is None:
            return None
        llm_window, how = Window(self.llm, slm_window.width), (self.settings.matcher, self.settings.reach)

        def observe(layer: int, query: Tensor, key: Tensor) -> None:
            llm_window.observe(layer, query, key)
            if llm_window.full and self.maps[b] is None:
                self._take_map(b, match_windows(llm_window, slm_window, *how))

        return observe

    def _score_prompts(
        self, first: int, prompts: list[list[int]], ids: list[Tensor], chunks: list[tuple[int, int]]
    ) -> None:
        """The SLM over the prompt of sequence `first`, several chunks at once; or if that is a single chunk, over those
        that follow and are as long, too. No more than the LLM's activations are at once: launching the SLM's small
        kernels takes longer than running them.

        Leaves a window of each to match on, or None: the map is given, or the prompt too short, and matched in the step
        that makes it long enough.
        """
        at_once = self.at_once
        n, count = len(prompts[first]), 1
        if len(chunks) == 1 and self.settings.slm_budget == 1:  # a cut cache takes in its prompts one by one
            alike = [len(prompt) == n for prompt in prompts[first : first + at_once]]
            count = (alike + [False]).index(False)
        matching = self.given_map is None and n >= WINDOW_MIN
        windows = [Window(self.slm, min(n, WINDOW_MAX)) if matching else None for _ in range(count)]
        self.windows.update(zip(range(first, first + count), windows))

        def observe(layer: int, query: Tensor, key: Tensor) -> None:
            for window, own_query, own_key in zip(windows, query.split(1), key.split(1)):
                window.observe(layer, own_query, own_key)

        staged = self.slm_cache.staging(first, n, count)
        tokens = torch.stack(ids[first : first + count]).to(self.slm.device)  # (count, n)
        for i in range(0, len(chunks), at_once):
            start, end = chunks[i][0], chunks[i : i + at_once][-1][1]
            span = Span.block(start, end, tokens.device)
            self.slm(tokens[:, start:end], span, staged, logits="none", observe=observe if matching else None)
        for b in range(first, first + count):
            self.slm_cache.load(b, staged.sequence(b - first), n)

    def _match(self, b: int) -> None:
        """In a step: match a sequence that was too short for it in its prefill, once it has WINDOW_MIN tokens."""
        if self.maps[b] is None and len(self.tokens[b]) >= WINDOW_MIN:
            settings = self.settings
            self._take_map(b, match_heads(self.llm, self.slm, self.tokens[b], settings.matcher, settings.reach))

    def _take_map(self, b: int, found: HeadMap) -> None:
        """f(i) of sequence b, frozen from here on."""
        self.maps[b], self.index[b] = found, found.index
        if self.settings.gate is not None:
            similarity = found.similarity  # (L, H)
            self.closed[b] = similarity.view(*self.closed.shape[1:], -1).mean(-1) < self.settings.gate

    # -- every step --

    def observe(self, tokens: list[int], span: Span) -> None:
        """One SLM step on the newest token of each sequence: its attention rows and scores are in the SLM's cache."""
        ids = torch.tensor(tokens, device=self.slm.device)[:, None]  # (B, 1)
        self.refreshing = self.due()
        self.slm_cache.begin(self.refreshing)
        self.slm(ids, span, self.slm_cache, logits="none")
        for b, token in enumerate(tokens):
            self.tokens[b].append(token)
            self.lengths[b] += 1
            self._match(b)
        self.end = span.end
        self.sizes = [self.settings.planned(length) for length in self.lengths]
        self.steps += 1

    def due(self) -> bool:
        """Whether this step chooses the tiers anew."""
        return self.steps % self.settings.refresh == 0

    def plan(self, layer: int) -> TierPlan:
        """The tiers of one LLM layer, from the newest scores: (B, G, n) masks and the rows to borrow (B, H, n)."""
        if self.refreshing:
            critical, marginal = self._choose(layer)
        else:
            critical, marginal = (F.pad(mask, (0, self.end - mask.shape[-1])) for mask in self.kept[layer])
            newest = torch.tensor(self.lengths, device=critical.device)[:, None, None] - 1  # (B, 1, 1)
            critical = critical | (torch.arange(self.end, device=critical.device) == newest)
        if self.settings.refresh > 1:
            self.kept[layer] = critical, marginal
        borrowed = self._matched(self.slm_cache.row, layer) if self.settings.marginal else None
        gained = self._newest(layer).masked_fill(critical | marginal, 0) if self.settings.fused else None
        return TierPlan(critical, marginal, borrowed, gained)

    def _choose(self, layer: int) -> tuple[Tensor, Tensor]:
        """Masks (B, G, n) of the critical and of the marginal tokens, ranked anew."""
        if self.settings.saliency_shift:
            return self._tiers(layer, self._ranking(layer))
        dropped = self.cache.dropped[layer, :, :, : self.end]
        scores = self.cache.score[layer, :, :, : self.end].masked_fill(dropped, -torch.inf)
        critical, marginal = self._tiers(layer, scores)
        return critical & ~dropped, marginal & ~dropped  # a tier that grows faster than the text has nobody to take

    def _tiers(self, layer: int, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The ranking cut into tiers, under the gate and the limit on moves: masks (B, G, n)."""
        critical, marginal = plan_tiers(scores, self.sizes, self.lengths)
        if self.settings.gate is not None:
            bare = [self.settings.bare.planned(length) for length in self.lengths]
            closed = self.closed[:, layer, :, None]  # (B, G, 1)
            critical = critical.where(~closed, plan_tiers(scores, bare, self.lengths)[0])
            marginal = marginal & ~closed
        if self.settings.max_moves is not None and self.steps > 1:  # the first plan fills the pools
            held = self.cache.key_position[layer]
            scores = recent_first(scores, self.sizes, self.lengths)
            critical = limit_moves(scores, critical, held, self.settings.max_moves)
        return critical, marginal

    def _ranking(self, layer: int) -> Tensor:
        """What tokens are ranked by, (B, G, n): a_f(i), one token set for the query heads that share a KV head."""
        if not self.settings.fused:
            return self._newest(layer)
        return self.settings.score_decay * self.cache.score[layer, :, :, : self.end].float() + self._newest(layer)

    def _newest(self, layer: int) -> Tensor:
        """The matched SLM heads' scores; with fused scores these are their newest rows: (B, G, n)."""
        return self._by_kv_head(self._matched(self.slm_cache.score, layer))

    def _by_kv_head(self, matched: Tensor) -> Tensor:
        """Sum over the query heads of each KV head: (B, H, n) -> (B, G, n)."""
        B, _, n = matched.shape
        return matched.view(B, self.llm.config.kv_heads, -1, n).sum(2)

    def _matched(self, table: Tensor, layer: int) -> Tensor:
        """Rows of the SLM heads f(i) of one LLM layer: (L', B, H', S) -> (B, H, n)."""
        return self.slm_cache.of_heads(table, self.index[:, layer], self.end)
