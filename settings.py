"""Every choice of the method, and how a budget is split into tiers.

Where it sits: read by smallkv.py, which makes the plan, by graph.py, by the flags of generate.py and by the options of
evaluate.py. The budget split is the paper's Section 4 (2:1:2 of critical : recent : marginal tokens); what the paper
leaves open at small and at large budgets is decided in `Settings.sizes`.
"""

import math
from dataclasses import dataclass, replace

from match import MATCHERS, WINDOW_MIN

SCORES = ("slm", "fused")
HELD = ("exact", "int8")  # how K and V lie
SMALL_BUDGET = 0.075  # below it the critical tokens stay as many as there (see Settings.sizes)


@dataclass(frozen=True)
class TierSizes:
    """Tokens per KV head at one length. critical counts the recent ones; what is left is offloaded."""

    critical: int
    recent: int
    marginal: int


@dataclass(frozen=True)
class Settings:
    """Every choice of the method. ValueError names the one that is out of range.

    budget: share of the full cache's bytes at the current length, in (0, 1].
    budget_tokens: instead of the share, bytes worth that many whole tokens (K and V), whatever the length.
    score_decay: d in `score = d * score + newest row`; 1 is the paper's accumulation, 0 the newest row alone.
    scores: "slm" ranks by the SLM's score; "fused" by d * memory + the SLM's newest row, the memory being the LLM's own
        attention where it can see: memory = d * memory + (own weight where held, the SLM's row elsewhere) after every
        LLM step. It begins with the prompt, which the LLM saw whole. Its weights are over what it holds, a little too
        large beside the SLM's: a pull to keep what is there. At decay 0 both are the same.
    matcher: how heads are compared, see match.py. marginal: keep a marginal tier; off, its bytes buy critical tokens.
    reach: which SLM layers an LLM layer is matched with, from 1 (those of its own depth) to math.inf (all, as in the
        paper); see `match.layers_within`. Within a finite reach graph.py runs the SLM beside the LLM.
    split: critical : recent : marginal in tokens, as "C:R:M"; a marginal token costs half.
    gate: KV heads whose matched similarity (mean over their query heads) is below it keep no marginal tier and spend
        its bytes on critical tokens. The pools are then allocated for either kind of head; the budget is what is used.
    saliency_shift: rank by the SLM; off, by the LLM's own weights on what it still holds (Eq. 4), no way back.
    prefetch: move the rows of a layer while the layer before it computes.
    refresh: plan in every refresh-th step, the first included. Between two plans nobody leaves, the newest token comes
        in, and marginal tokens borrow from the newest row as ever; see `planned`.
    max_moves: at most that many tokens a KV head enter the critical set at a plan, see `limit_moves`; None: no limit.
    slm_budget: share of the SLM's own cache that it keeps, as H2O would; 1 keeps all. See frugal.py.
    llm_kv: how the LLM's tiers hold K and V: "exact", or "int8", half the bytes of 16-bit ones on the GPU, on the host
        and on their way. See int8_rows.py; prompts must have its SHORTEST tokens.
    slm_kv: how the SLM's own cache holds K and V: "exact", or "int8", half the bytes of 16-bit ones. It only ranks (and
        lends rows): the LLM's K and V are what they were. The prompt is ranked by exact ones. The whole cache, no
        drafts; prompts as above.

    The defaults measured best on texts that nothing was chosen on (README, "Which setting"); `Settings.paper` is the
    paper's.
    """

    budget: float = 0.2
    budget_tokens: int | None = None
    score_decay: float = 0.5
    scores: str = "fused"
    matcher: str = "cosine"
    reach: float = 2.0
    marginal: bool = False
    saliency_shift: bool = True
    prefetch: bool = True
    refresh: int = 1
    split: str = "2:1:2"
    gate: float | None = None
    max_moves: int | None = None
    slm_budget: float = 1.0
    llm_kv: str = "exact"
    slm_kv: str = "exact"

    def __post_init__(self):
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget {self.budget} is outside (0, 1]; 0.2 keeps a fifth of the full cache's bytes")
        if self.budget_tokens is not None and self.budget_tokens < 1:
            raise ValueError(f"budget of {self.budget_tokens} tokens is too small; at least 1")
        if not 0 <= self.score_decay <= 1:
            raise ValueError(f"score decay {self.score_decay} is outside [0, 1]; 1 is the paper's accumulation")
        if self.scores not in SCORES:
            raise ValueError(f"unknown scores {self.scores!r}; supported: {', '.join(SCORES)}")
        if self.fused and not self.saliency_shift:
            raise ValueError("fused scores need the SLM's: without saliency shift, ask for scores slm")
        if self.matcher not in MATCHERS:
            raise ValueError(f"unknown matcher {self.matcher!r}; supported: {', '.join(MATCHERS)}")
        if not self.reach >= 1:
            raise ValueError(f"reach {self.reach} is below 1: no SLM layer is as early as that; inf matches with all")
        if self.refresh < 1:
            raise ValueError(f"a plan every {self.refresh} steps is impossible; 1 plans in every step")
        if self.shares[2] == 0 and self.marginal:
            raise ValueError(f"split {self.split} leaves the marginal tier nothing: switch it off or give it tokens")
        if self.gate is not None and not (self.marginal and -1 <= self.gate <= 1):
            raise ValueError(f"gate {self.gate} should be a similarity, from -1 to 1, and needs the marginal tier")
        if self.max_moves is not None and (self.max_moves < 0 or self.marginal or not self.saliency_shift):
            raise ValueError(f"{self.max_moves} moves: a limit is at least 0, needs saliency shift and goes without a "
                             "marginal tier, which moves tokens of its own")  # fmt: skip
        if not 0 < self.slm_budget <= 1:
            raise ValueError(f"SLM budget {self.slm_budget} is outside (0, 1]; 0.4 keeps two fifths of the SLM's cache")
        for name, held in (("llm-kv", self.llm_kv), ("slm-kv", self.slm_kv)):
            if held not in HELD:
                raise ValueError(f"unknown {name} {held!r}; supported: {', '.join(HELD)}")
        if self.slm_int8 and self.slm_budget < 1:
            raise ValueError(f"slm-kv int8 is for the SLM's whole cache, and SLM budget {self.slm_budget} cuts it; "
                             "leave one of the two out")  # fmt: skip

    @classmethod
    def paper(cls, **changes) -> "Settings":
        """The paper's setting: accumulated scores, Jaccard matcher over all layers, marginal tier."""
        theirs = {"score_decay": 1.0, "scores": "slm", "matcher": "jaccard", "reach": math.inf, "marginal": True}
        return cls(**{**theirs, **changes})

    @property
    def fused(self) -> bool:
        return self.scores == "fused"

    @property
    def slm_decay(self) -> float:
        """Of the SLM's scores: with fused ones the memory is the LLM's, and the SLM's are its newest row."""
        return 0.0 if self.fused else self.score_decay

    @property
    def logits(self) -> bool:
        """Whether a static step keeps the SLM's newest logits as its scores: nothing of the past, nobody borrows."""
        return self.slm_decay == 0 and not self.marginal and self.slm_budget == 1

    @property
    def llm_int8(self) -> bool:
        return self.llm_kv == "int8"

    @property
    def slm_int8(self) -> bool:
        return self.slm_kv == "int8"

    @property
    def shares(self) -> tuple[float, float, float]:
        """Critical, recent and marginal share of the budget's bytes: 2:1:2 in tokens is 2:1:1 in bytes."""
        try:
            critical, recent, marginal = (float(part) for part in self.split.split(":"))
            whole = critical + recent + marginal / 2
            if min(critical, recent, marginal) < 0 or not 0 < critical < float("inf") or not whole < float("inf"):
                raise ValueError
        except (AttributeError, ValueError):
            raise ValueError(f"split {self.split!r} is not C:R:M, three counts of tokens such as 2:1:2") from None
        return critical / whole, recent / whole, marginal / 2 / whole

    @property
    def static(self) -> bool:
        """Whether graph.py has a step for it: a gate asks for sizes by head, no saliency shift for the last weights."""
        return self.saliency_shift and self.gate is None

    @property
    def bare(self) -> "Settings":
        """What holds for the KV heads that the gate leaves no marginal tier."""
        return replace(self, marginal=False, gate=None)

    def sizes(self, length: int) -> TierSizes:
        """The split of the budget at one length, in tokens.

        2:1:2 of critical : recent : marginal tokens, or `split`; a marginal token costs half, so the bytes go 2:1:1.
        Without a marginal tier 3:1: its bytes go to the critical ones. Three rules at the edges (figures at 2:1:2):
        - floor: below 7.5 % the critical share stays what it is there, 3.75 % of the length, while recent and marginal
          shrink in proportion, until it has 3/4 of the budget (at 5 %); below that all shrink together;
        - ceiling: once the three cover every token (from 80 %), more bytes turn marginal tokens critical, until at
          100 % all are;
        - nothing is dropped while the context is shorter than the matching window.
        """
        if length < WINDOW_MIN:
            return TierSizes(length, 1, 0)
        share = self.budget if self.budget_tokens is None else min(1.0, self.budget_tokens / length)
        rows = int(2 * share * length + 1e-9)  # K or V rows the budget pays for
        of_critical, of_recent, of_marginal = self.shares
        if self.marginal:
            critical_share = max(of_critical * share, min(of_critical * SMALL_BUDGET, 0.75 * share))
            recent_share = (share - critical_share) * of_recent / (of_recent + of_marginal)
        else:
            recent_share = of_recent * share
        whole = max(1, rows // 2)  # the token being decoded is always there, whatever the budget
        recent = max(1, int(recent_share * length + 1e-9))
        if not self.marginal:
            return TierSizes(whole, recent, 0)
        critical = min(whole, recent + int(critical_share * length + 1e-9))
        marginal = max(0, rows - 2 * critical)
        if critical + marginal > length:
            critical = min(length, rows - length)
            marginal = length - critical
        return TierSizes(critical, recent, marginal)

    def planned(self, length: int) -> TierSizes:
        """What a plan at this length chooses, so that it lasts until the next one; `sizes` itself if that is near.

        The refresh - 1 tokens to come find their places free: with them the tiers are those of `sizes` in the last step
        before the next plan, never more (unless that is below refresh tokens: the newest ones always stay). The recent
        window is that of `sizes`, and only grows until the next plan. While the context is shorter than the matching
        window everything is kept, on to the next plan.
        """
        if length < WINDOW_MIN or self.refresh == 1:
            return self.sizes(length)
        coming = self.refresh - 1
        last, now = self.sizes(length + coming), self.sizes(length)
        critical = max(1, last.critical - coming)
        return TierSizes(critical, min(now.recent, critical), last.marginal)
