"""What SmallKV is measured against, as policies for the same decoder: each is a rule of who stays.

Where it sits: beside smallkv.py; decode.Session asks a policy for its plan and knows no more. The slots are in
evicting.py, PyramidInfer has a module of its own, `decode.FullPolicy` keeps everything.

| policy         | after the prefill                           | at every step                         | paper      |
| -------------- | ------------------------------------------- | ------------------------------------- | ---------- |
| `H2O`          | half heavy hitters, half newest             | the same, by all attention so far     | 2306.14048 |
| `PyramidInfer` | what recent queries like; less when deeper  | thins 16 tokens of the answer at once | 2405.12532 |
| `StreamingLLM` | four sinks, then the newest                 | the same                              | 2309.17453 |
| `SnapKV`       | what the last 32 queries like, pooled       | every new token stays                 | 2404.14469 |
| `Window`       | the newest                                  | the same                              |            |
| `Oracle`       | everything                                  | attends to the exact top-k            |            |

The budget counts tokens (K and V) per KV head, the one being decoded among them: at length n a step attends to
`Budget.kept(n)` tokens, as with SmallKV's critical tier, and the pool has that many slots. SnapKV and PyramidInfer say
how theirs is counted. Keys keep the RoPE of their true positions. Scores are per sequence and KV head, summed over the
heads that share it (a mean would rank alike). Pads never enter a model (decode.strip_pads), so none is ever scored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from evicting import Budget, Evicting, EvictingCache
from full_cache import Entry, FullCache, ScoredCache
from kernels import attention_rows, full_attention_step, tiered_attention
from model import Config, Decoder, Span
from pyramid import PyramidInfer

SINKS = 4  # StreamingLLM's default


# ---- StreamingLLM ----------------------------------------------------------------------------------------------------


class StreamingLLM(Evicting):
    """Four sinks and the newest tokens. Small budgets spend at most half on sinks.

    Published code gives keys the position of their slot; here they keep their own, so nothing is rotated twice. Inside
    the positions that a model was trained on, where the full cache works too, the difference is the distance to sinks.
    """

    name = "streaming"
    sinks = SINKS

    def priority(self, position: Tensor, score: None, length: Tensor, kept: Tensor) -> Tensor:
        sinks = (kept // 2).clamp(max=self.sinks)
        return position.float().masked_fill(position < sinks, torch.inf)


class Window(StreamingLLM):
    """The newest tokens alone: the least a method must beat."""

    name = "window"
    sinks = 0


# ---- H2O -------------------------------------------------------------------------------------------------------------


class HeavyCache(EvictingCache):
    """Slots with scores: the attention a kept token has gathered, summed over the heads that share its KV head."""

    def __init__(self, config: Config, batch: int, slots: list[int], device, dtype: torch.dtype, policy):
        super().__init__(config, batch, slots, device, dtype, policy)
        self.score = [torch.zeros(position.shape, device=device) for position in self.position]  # (B, G, N) fp32

    def _take(self, layer: int, b: int, staged: ScoredCache, kept: Tensor) -> None:
        super()._take(layer, b, staged, kept)
        self.score[layer][b, :, : kept.shape[1]] = self.policy.prompt_scores(layer, staged).gather(1, kept)

    def _remember(self, layer: int, slot: Tensor, weight: Tensor) -> None:
        score = self.score[layer].scatter_(2, slot, 0.0)  # whoever had the newest token's slot takes its score along
        B, G, N = score.shape
        score += weight.view(B, G, -1, N).sum(2)

    def ledger(self) -> list[Entry]:
        scores = sum(score.nbytes for score in self.score)
        return super().ledger() + [Entry("scores", self.score[0].device.type, scores)]

    @staticmethod
    def predict(config: Config, batch: int, slots: list[int], device: str, dtype: torch.dtype) -> list[Entry]:
        scores = batch * config.kv_heads * sum(slots) * torch.float32.itemsize
        return EvictingCache.predict(config, batch, slots, device, dtype) + [Entry("scores", device, scores)]


class EagerCache(ScoredCache):
    """A scored cache that attends as H2O was published: with the whole attention matrix. For its running time."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, span: Span) -> Tensor:
        seen_key, seen_value = self._append(layer, key, value, span)
        share = query.shape[1] // key.shape[1]
        rows = attention_rows(query, seen_key, span.end - query.shape[2])  # (B, H, T, end): n x n in one chunk
        self.score[layer, :, :, : span.end] += rows.sum(2)
        return rows.to(value.dtype) @ seen_value.repeat_interleave(share, 1)


class H2O(Evicting):
    """Heavy-Hitter Oracle: half of the budget newest tokens, half those that gathered most attention since they came.

    Scores are plain sums over all queries, as published (no decay, no sinks, no pooling); what is dropped is gone with
    its score. Deviations: the budget grows with the text unless `Budget.of_prompt`; the token being decoded counts as
    one of the newest; scores of the prompt come from column sums in blocks, not from an n x n matrix. `eager` makes the
    matrix, over the whole prompt, for the published running time: the same tokens are kept.
    """

    name = "h2o"
    cache_type = HeavyCache

    def __init__(self, llm: Decoder, budget: Budget, eager: bool = False):
        super().__init__(llm, budget)
        self.eager = self.whole_prompt = eager

    def staging(self, b: int, length: int) -> ScoredCache:
        kind = EagerCache if self.eager else ScoredCache
        return kind(self.llm.config, 1, length, self.llm.device, self.llm.dtype, 1.0)

    def prompt_scores(self, layer: int, staged: ScoredCache) -> Tensor:
        score = staged.score[layer, 0]  # (H, n)
        return score.view(self.llm.config.kv_heads, -1, score.shape[-1]).sum(1)

    def kept_scores(self, layer: int) -> Tensor:
        return self.cache.score[layer]

    def priority(self, position: Tensor, score: Tensor, length: Tensor, kept: Tensor) -> Tensor:
        recent = kept - kept // 2
        return score.masked_fill(position >= length - recent, torch.inf)


# ---- SnapKV ----------------------------------------------------------------------------------------------------------


class QueryCache(FullCache):
    """A full cache that also remembers the last `window` queries of every layer, (L, B, H, window, D)."""

    def __init__(self, config: Config, batch: int, capacity: int, device, dtype: torch.dtype, window: int):
        super().__init__(config, batch, capacity, device, dtype)
        self.query = torch.zeros(config.layers, batch, config.query_heads, window, config.head_dim,
                                 device=device, dtype=dtype)  # fmt: skip

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, span: Span) -> Tensor:
        window = self.query.shape[3]
        self.query[layer] = torch.cat((self.query[layer], query), dim=2)[:, :, -window:]
        return super().attend(layer, query, key, value, span)


POOLS = {"max": F.max_pool1d, "avg": F.avg_pool1d}


class SnapKV(Evicting):
    """The prompt is compressed once, to what its last queries attend to; every token of the answer is kept.

    The last 32 tokens stay and vote: the sum of their attention on each earlier token, summed over the heads of a
    group, pooled over 7 neighbours (max, as in the published LongBench runs; avg is the other one there). The budget is
    counted on the prompt, as published: a share of it stays, and the answer comes on top, in slots that the ledger
    shows. Budgets of fewer than 64 tokens spend half on the observation window.
    """

    name = "snapkv"
    window, kernel = 32, 7

    def __init__(self, llm: Decoder, budget: Budget, pooling: str = "max"):
        super().__init__(llm, budget)
        if pooling not in POOLS:
            raise ValueError(f"unknown pooling {pooling!r}; supported: {', '.join(POOLS)}")
        self.pool = POOLS[pooling]

    def observed(self, prompt: int) -> int:
        """Queries that vote, and newest tokens that stay."""
        return max(1, min(self.window, self.budget.kept(prompt) // 2))

    def slots(self, lengths: list[int], capacity: int) -> list[int]:
        answer = capacity - max(lengths)
        return [max(map(self.budget.kept, lengths)) + answer] * self.llm.config.layers

    def staging(self, b: int, length: int) -> QueryCache:
        return QueryCache(self.llm.config, 1, length, self.llm.device, self.llm.dtype, self.observed(length))

    def keep_prompt(self, layer: int, b: int, staged: QueryCache) -> Tensor:
        n, G = self.prompts[b], self.llm.config.kv_heads
        window, kept = self.observed(n), self.budget.kept(n)
        newest = torch.arange(n - window, n, device=self.llm.device).expand(G, window)
        if kept == window:  # one token: there is nothing to vote on
            return newest
        rows = attention_rows(staged.query[layer], staged.key[layer], n - window)  # (1, H, window, n)
        votes = rows[0, :, :, : n - window].sum(1).view(G, -1, n - window).sum(1)  # (G, n - window)
        pooled = self.pool(votes, self.kernel, stride=1, padding=self.kernel // 2)
        best = pooled.argsort(dim=-1, descending=True, stable=True)[:, : kept - window]
        return torch.cat((best.sort().values, newest), dim=-1)  # (G, kept)

    def plan(self, layer: int) -> Tensor:
        return self.cache.position[layer] >= 0


# ---- The oracle ------------------------------------------------------------------------------------------------------


class OracleCache(FullCache):
    """A full cache that attends, at every step, only to the tokens of largest attention: k a sequence, per KV head."""

    _plan = None

    def staging(self, b: int, length: int) -> "OracleCache":
        view = super().staging(b, length)
        view._plan = None  # a prefill sees everything, in a chunk of one token too
        return view

    def migrate(self, plan, span: Span) -> None:
        """plan(layer) gives k for each sequence, as (B,) on the device, and the largest of them."""
        self._plan = plan

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, span: Span) -> Tensor:
        if self._plan is None:
            return super().attend(layer, query, key, value, span)
        seen_key, seen_value = self._append(layer, key, value, span)
        B, G, end, D = seen_key.shape
        rows = full_attention_step(query, seen_key, seen_value, span.positions[:, 0])[1]  # (B, H, end)
        unseen = torch.arange(end, device=rows.device) > span.positions  # (B, end)
        mass = rows.view(B, G, -1, end).sum(2).masked_fill(unseen[:, None], -1.0)  # (B, G, end)
        counts, most = self._plan(layer)
        best = mass.topk(most).indices  # (B, G, most), largest first
        slots = torch.arange(most, device=rows.device).expand_as(best)
        gathered = [x.gather(2, best[..., None].expand(B, G, most, D)) for x in (seen_key, seen_value)]
        nothing = torch.zeros(B, query.shape[1], most, device=rows.device)
        return tiered_attention(query, *gathered, slots < counts[:, None, None], slots, nothing)[0]


class Oracle:
    """Exact top-k: every step sees the k tokens of largest attention, found with all keys: what selecting by attention
    can reach. The cache is full, and the ledger says so.
    """

    name = "oracle"
    whole_prompt = False

    def __init__(self, llm: Decoder, budget: Budget):
        self.llm, self.budget, self.models = llm, budget, [llm]

    def make_cache(self, lengths: list[int], capacity: int) -> OracleCache:
        self.prompts, self.lengths = list(lengths), list(lengths)
        return OracleCache(self.llm.config, len(lengths), capacity, self.llm.device, self.llm.dtype)

    def predict(self, lengths: list[int], capacity: int) -> dict[str, list[Entry]]:
        device = self.llm.device.type
        return {"LLM": OracleCache.predict(self.llm.config, len(lengths), capacity, device, self.llm.dtype)}

    def prefill(self, b: int, prompts, ids, chunks) -> None:
        pass

    def observe(self, tokens: list[int], span: Span) -> None:
        self.lengths = [length + 1 for length in self.lengths]
        self.kept = [self.budget.kept(length, prompt) for length, prompt in zip(self.lengths, self.prompts)]

    def plan(self, layer: int) -> tuple[Tensor, int]:
        return torch.tensor(self.kept, device=self.llm.device), max(self.kept)


BASELINES = {policy.name: policy for policy in (H2O, PyramidInfer, StreamingLLM, SnapKV, Oracle, Window)}
