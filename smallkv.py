"""SmallKV (arXiv 2508.02751): every choice of the method, the split of a budget into tiers, and the policy.

Where it sits: tokens -> **SLM -> scores -> tier plan** -> migration (cache.py) -> LLM -> token. Section 4 of the paper:

- saliency-shift compensation (Eq. 4-5): tokens are ranked by `a_f(i)`, the scores of the matched head of the SLM, which
  keeps its whole cache, so a token that was dropped can come back;
- marginal compensation (Eq. 6): the tokens ranked below the critical ones keep V alone, and borrow the SLM's attention.

Beyond the paper: the scores may forget (`score_decay`), because with a full SLM cache and a way back for every token
nothing forces the ranking to be about the past; the LLM's own attention takes the SLM's place in them where it sees a
token (`scores="fused"`); and the KV heads of a layer share its slots (`uniform` off). All are the default. The marginal
tier is not: with these scores its bytes bring more as critical tokens (README.md). `Settings.paper` gives the paper's
three tiers and accumulation.

Shapes follow the legend in model.py.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cache import Cache, ScoredCache, TieredCache
from decode import Policy, read_prompt
from evicting import CutCache
from match import MATCHERS, WINDOW_MAX, WINDOW_MIN, HeadMap, Window, layers_within, match_heads, match_windows
from model import Decoder, Span
from scores import matched_rows, rank_scores

SCORES, OFFLOAD = ("slm", "fused"), ("cpu", "none")
SMALL_BUDGET = 0.075  # below it the critical tokens stay as many as there (see Settings.sizes)


# ---- Settings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TierSizes:
    """Tokens per KV head at one length, on average where heads share their slots. critical counts the recent ones; what
    is left is offloaded."""

    critical: int
    recent: int
    marginal: int


def choice(default, help: str):
    """A field that is also a flag of generate.py, and what its help says."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """Every choice of the method. ValueError names the one that is out of range.

    scores: "slm" ranks by the SLM's score; "fused" by d * memory + the SLM's newest row, the memory being the LLM's own
        attention where it can see: memory = d * memory + (own weight where held, the SLM's row elsewhere) after every
        LLM step. It begins with the prompt, which the LLM saw whole.
    reach: which SLM layers an LLM layer is matched with, from 1 (those of its own depth) to math.inf (all, as in the
        paper); see `match.layers_within`. Within a finite reach the SLM runs beside the LLM on a GPU.
    saliency_shift off: tokens are ranked by the LLM's own weights on what it still holds, with no way back (H2O-like).
    """

    budget: float = choice(0.2, "share of the full cache's bytes at the current length")
    budget_tokens: int | None = choice(None, "instead: bytes of that many whole tokens")
    scores: str = choice("fused", "rank by the LLM's own attention where it sees a token, else the SLM's (fused), or "
                         "by the SLM's alone (slm)")  # fmt: skip
    score_decay: float = choice(0.5, "score = D * score + newest row; 1 is the paper's accumulation")
    matcher: str = choice("cosine", "how LLM and SLM heads are compared; jaccard is the paper's")
    reach: float = choice(2.0, "SLM layers an LLM layer is matched with: 1, as deep as it; 2, twice that; inf, all")
    marginal: bool = choice(False, "keep a marginal tier; off, its bytes buy critical tokens")
    saliency_shift: bool = choice(True, "let tokens come back")
    uniform: bool = choice(False, "as many slots for every KV head; off, a layer's heads share them")
    slm_budget: float = choice(1.0, "share of the SLM's own cache that stays, by H2O's rule")
    offload: str = choice("cpu", "where the third tier lies: the host, or the GPU itself (none)")

    def __post_init__(self):
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget {self.budget} is outside (0, 1]; 0.2 keeps a fifth of the full cache's bytes")
        if self.budget_tokens is not None and self.budget_tokens < 1:
            raise ValueError(f"budget of {self.budget_tokens} tokens is too small; at least 1")
        if not 0 <= self.score_decay <= 1:
            raise ValueError(f"score decay {self.score_decay} is outside [0, 1]; 1 is the paper's accumulation")
        for name, value, known in (("scores", self.scores, SCORES), ("matcher", self.matcher, MATCHERS),
                                   ("offload", self.offload, OFFLOAD)):  # fmt: skip
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; supported: {', '.join(known)}")
        if self.fused and not self.saliency_shift:
            raise ValueError("fused scores need the SLM's: without saliency shift, ask for scores slm")
        if not self.reach >= 1:
            raise ValueError(f"reach {self.reach} is below 1: no SLM layer is as early as that; inf matches with all")
        if not 0 < self.slm_budget <= 1:
            raise ValueError(f"SLM budget {self.slm_budget} is outside (0, 1]; 0.4 keeps two fifths of the SLM's cache")

    @classmethod
    def paper(cls, **changes) -> "Settings":
        """The paper's setting: three tiers, accumulated scores of the SLM, Jaccard matcher over all layers."""
        theirs = {"marginal": True, "score_decay": 1.0, "scores": "slm", "matcher": "jaccard", "reach": math.inf}
        return cls(**theirs | {"uniform": True} | changes)

    @property
    def fused(self) -> bool:
        return self.scores == "fused"

    def table(self, length: Tensor, drafts: int = 0) -> Tensor:
        """What a plan chooses by length: (n,) int64 -> (n, 3) int64, critical, recent and marginal tokens.

        With so many drafts that come in after the plan, the tiers are with all of them those of the length that they
        reach, never more but for the newest token and its drafts, which are always there. While the context is shorter
        than the matching window everything is kept.
        """
        now, last = self.split(length), self.split(length + drafts)
        critical = (last[:, 0] - drafts).clamp(min=1)
        planned = torch.stack((critical, now[:, 1].minimum(critical), last[:, 2]), 1)
        whole = torch.stack((length, torch.ones_like(length), torch.zeros_like(length)), 1)
        return planned.where(length[:, None] >= WINDOW_MIN, whole)

    def sizes(self, length: int, drafts: int = 0) -> TierSizes:
        """`table` at one length."""
        return TierSizes(*self.table(torch.tensor([length]), drafts)[0].tolist())

    def split(self, length: Tensor) -> Tensor:
        """The split of the budget, (n,) -> (n, 3).

        2:1:2 of critical : recent : marginal tokens (Section 4); a marginal token costs half, so the bytes go 2:1:1.
        Without a marginal tier 3:1: its bytes go to the critical ones. Two rules at the edges:
        - floor: below 7.5 % the critical share stays what it is there, 3.75 % of the length, while recent and marginal
          shrink in proportion, until it has 3/4 of the budget (at 5 %); below that all shrink together;
        - ceiling: once the three cover every token (from 80 %), more bytes turn marginal tokens critical, until all are
          at 100 %.
        """
        share = torch.full(length.shape, self.budget, dtype=torch.float64)
        if self.budget_tokens is not None:
            share = (self.budget_tokens / length.double()).clamp(max=1.0)
        rows = (2 * share * length + 1e-9).long()  # K or V rows the budget pays for
        critical_share = (0.75 * share).clamp(max=0.5 * SMALL_BUDGET).maximum(0.5 * share)
        recent_share = (share - critical_share) / 2 if self.marginal else 0.25 * share
        whole = (rows // 2).clamp(min=1)  # the token being decoded is always there, whatever the budget
        recent = (recent_share * length + 1e-9).long().clamp(min=1)
        if not self.marginal:
            return torch.stack((whole, recent, torch.zeros_like(rows)), 1)
        critical = whole.minimum(recent + (critical_share * length + 1e-9).long())
        marginal = (rows - 2 * critical).clamp(min=0)
        full = critical + marginal > length
        critical = critical.where(~full, (rows - length).minimum(length))
        return torch.stack((critical, recent, marginal.where(~full, length - critical)), 1)


# ---- The policy ------------------------------------------------------------------------------------------------------


class SmallKV(Policy):
    """The method for one batch: owns the head maps f(i), and asks the caches for the rest.

    A plan of LLM layer l: the scores of the heads f(i) in the SLM's cache, summed for each KV head (Eq. 4-5), go to the
    LLM's cache, which chooses the tiers by them; marginal slots then borrow the newest rows of the same heads (Eq. 6).
    """

    name = "smallkv"

    def __init__(
        self, llm: Decoder, slm: Decoder, settings: Settings, head_map: Tensor | None = None, drafts: int = 0
    ):  # fmt: skip
        """head_map (L, H) int64 replaces the matching, for experiments and tests (ValueError if it passes the settings'
        reach). drafts: new tokens of a round beside the newest (speculative.py)."""
        super().__init__(llm)
        self.slm, self.settings, self.drafts = slm, settings, drafts
        self.given_map = None if head_map is None else head_map.to(llm.device)
        self.models = [llm, slm]
        if drafts and settings.fused:
            raise ValueError("drafts need scores slm: fused ones take in weights of tokens not yet kept")
        if drafts and not settings.saliency_shift:
            raise ValueError("drafts need saliency shift: without it the tiers follow weights of tokens not yet kept")
        if drafts and settings.slm_budget < 1:
            raise ValueError(f"drafts need the SLM's whole cache, and SLM budget {settings.slm_budget} cuts it; leave "
                             "one of the two out")  # fmt: skip
        layers, slm_layers = llm.config.layers, slm.config.layers
        self.needed = [layers_within(settings.reach, layer, layers, slm_layers) for layer in range(layers)]
        if head_map is not None:
            deepest = (head_map.amax(1) // slm.config.query_heads).tolist()
            if any(found >= near for found, near in zip(deepest, self.needed)):
                raise ValueError(f"head map: its SLM layers {deepest} are not all among the first {self.needed} that "
                                 f"reach {settings.reach} lets the LLM's layers have")  # fmt: skip

    # -- before the first token --

    def make_caches(self, lengths: list[int], capacity: int, device) -> dict[str, Cache]:
        settings, batch = self.settings, len(lengths)
        slm = self.slm.config, batch, capacity, device, self.slm.dtype, 0.0 if settings.fused else settings.score_decay
        if settings.slm_budget < 1:
            slm_cache = CutCache(*slm, settings.slm_budget)
        else:
            slm_cache = ScoredCache(*slm, rows=self.drafts + 1)
        critical, _, marginal = settings.table(torch.arange(min(lengths), capacity + 1), self.drafts).amax(0).tolist()
        own = settings.score_decay if settings.fused or not settings.saliency_shift else None
        slots = critical + self.drafts, marginal
        llm = self.llm.config, batch, capacity, *slots, device, self.llm.dtype, own, self.drafts + 1, settings.offload
        return {"LLM": TieredCache(*llm, not settings.uniform), "SLM": slm_cache}

    def allocate(self, lengths: list[int], capacity: int) -> None:
        super().allocate(lengths, capacity)
        self.slm_cache, device = self.caches["SLM"], self.llm.device
        self.maps: list[HeadMap | None] = [None] * len(lengths)
        shape = (self.llm.config.layers, len(lengths), self.llm.config.query_heads)
        self.index = torch.zeros(shape, dtype=torch.int32, device=device)  # f(i), counted l' * H' + h'
        table = self.settings.table(torch.arange(capacity + 1), self.drafts)
        self.sizes = table.to(device, torch.int32)  # (S + 1, 3), by length
        self.allowed: Tensor | None = None  # of a round: how many drafts of each sequence count

    def prefill(self, b: int, tokens: Tensor, chunk: int, progress=None) -> Tensor:
        """SLM, then LLM over the prompt of sequence b, each in a window of the same first tokens: its heads are
        matched."""
        n, windows = tokens.shape[1], []
        staged = self.slm_cache.staging(b, n), self.cache.staging(b, n)
        if self.given_map is not None:
            nothing = torch.full(self.given_map.shape, torch.nan)
            self._take_map(b, HeadMap(self.given_map, nothing, nothing))
        elif n >= WINDOW_MIN:
            windows = [Window(model, min(n, WINDOW_MAX)) for model in (self.slm, self.llm)]
            for cache, window in zip(staged, windows):
                cache.observe = window.observe
        read_prompt(self.slm, tokens, staged[0], chunk, logits="scores")
        logits = read_prompt(self.llm, tokens, staged[1], chunk, progress=progress)
        self.slm_cache.load(b, staged[0])
        self.cache.load(b, staged[1])
        if windows:
            self._take_map(b, match_windows(windows[1], windows[0], self.settings.matcher, self.settings.reach))
        return logits

    def match(self, b: int, text: list[int]) -> None:
        """A sequence that was too short for it in its prefill is matched once it has WINDOW_MIN tokens."""
        if self.maps[b] is None and len(text) >= WINDOW_MIN:
            how = self.settings.matcher, self.settings.reach
            self._take_map(b, match_heads(self.llm, self.slm, text[:WINDOW_MIN], *how))

    def _take_map(self, b: int, found: HeadMap) -> None:
        """f(i) of sequence b, frozen from here on."""
        self.maps[b] = found
        self.index[:, b] = found.index

    # -- every step --

    def observe(self, tokens: Tensor, span: Span, cache) -> None:
        """One SLM step on the newest tokens: its attention rows are in the SLM's cache."""
        self.slm(tokens, span, cache, logits="scores")

    def rank(self, layer: int, span: Span) -> Tensor:
        """What the tokens of one LLM layer rank by, (B, G, S) fp32: the matched heads' scores, and the LLM's memory."""
        settings, slm, memory = self.settings, self.slm_cache, self.cache.memory
        if memory is not None:
            self.cache.fold(layer)
        return rank_scores(
            slm.logits, slm.lse, slm.score if settings.saliency_shift else None, self.index[layer],
            settings.score_decay, span.length, self.llm.config.kv_heads, None if memory is None else memory[layer],
            self.allowed,
        )  # fmt: skip

    def plan(self, layer: int, span: Span) -> None:
        """Tiers of one LLM layer from the newest scores, their slots, and what the marginal ones borrow."""
        cache, slm, total = self.cache, self.slm_cache, self.rank(layer, span)
        if self.settings.saliency_shift:
            cache.place(layer, total, self.sizes, span.length, memory=self.settings.fused)
        else:
            cache.place(layer, cache.memory[layer], self.sizes, span.length, memory=False)
            self._drop(layer, total, span.length)
        if cache.marginal is not None:
            matched_rows(slm.logits, slm.lse, self.index[layer], cache.slots_of(layer)[1], cache.borrowed[layer])

    def _drop(self, layer: int, total: Tensor, length: Tensor) -> None:
        """Without saliency shift: a token in no tier never comes back, its score is below 0; marginal tokens are
        remembered with the row that they borrow; the critical ones get their own weights in the LLM's attention."""
        cache, memory = self.cache, self.cache.memory[layer]
        (B, G, S), device = memory.shape, memory.device
        marks = torch.zeros(B, G * S + 1, dtype=torch.int8, device=device)
        for mark, slots in enumerate(cache.slots_of(layer), 1):
            if slots is not None:
                marks.scatter_(1, slots.cells(S), mark)
        marks, coming = marks[:, :-1].view(B, G, S), torch.arange(S, device=device) >= length[:, None, None]
        memory.copy_(memory.where((marks == 1) | coming, total.where(marks == 2, -1)))

    def migrate(self, layer: int) -> None:
        self.cache.migrate(layer)

    def settle(self, span: Span, kept: Tensor | None = None) -> None:
        """The SLM's newest rows go into its scores. kept (B,) int32: with drafts, how many of the T tokens count; the
        slots of the others are free again."""
        self.slm_cache.fold(span.length, kept)
        self.cache.settle(span.length - 1)
        if kept is not None:
            self.cache.free_from(span.length - 1 + kept)
