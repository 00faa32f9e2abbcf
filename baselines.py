"""What SmallKV is measured against, as policies for the same decoder and the same step.

Where it sits: beside smallkv.py; decode.Session drives either. What a method keeps lies in the slots of
`evicting.SlotCache`; what is not kept is gone, and memory for it was never allocated. `decode.Policy` keeps everything.

| method         | after the prefill                           | at every step                         | paper      |
| -------------- | ------------------------------------------- | ------------------------------------- | ---------- |
| `h2o`          | half heavy hitters, half newest             | the same, by all attention so far     | 2306.14048 |
| `pyramidinfer` | what recent queries like; less when deeper  | thins 16 tokens of the answer at once | 2405.12532 |
| `streaming`    | four sinks, then the newest                 | the same                              | 2309.17453 |
| `snapkv`       | what the last 32 queries like, pooled       | every new token stays                 | 2404.14469 |
| `window`       | the newest                                  | the same                              |            |
| `oracle`       | everything                                  | attends to the exact top-k            |            |
| `oracle-shared` | everything                                 | the same, of a layer's heads together | 2407.11550 |

The budget counts tokens (K and V) per KV head, the one being decoded among them: at length n a step attends to
`Evicting.kept(n)` tokens, as with SmallKV's critical tier, and the pool has that many slots. SnapKV and PyramidInfer
say how theirs is counted. Keys keep the RoPE of their true positions. Scores are per sequence and KV head, summed over
the query heads that share it (a mean would rank alike).

To add a method that evicts by a rule: a function like `window` below, a line in `BASELINES`, and a loop that it must
equal in `NAIVE` of tests/naive.py.

Shapes follow the legend in model.py; N, the slots of a layer, may differ between layers here.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cache import Cache, FullCache, Prompt
from decode import Policy, read_prompt
from evicting import SlotCache, best_slots, heavy_order, kept_tokens
from kernels import SCORE_BLOCK, attention_rows, causal_attention, decode_attention
from model import Config, Decoder, Span
from ops import Rope, Slots, rotate

SINKS = 4  # StreamingLLM's default, and PyramidInfer's as shipped


# ---- Rules of eviction -----------------------------------------------------------------------------------------------


def window(position: Tensor, heavy: Tensor | None, length: Tensor, kept: Tensor) -> Tensor:
    """The newest tokens alone: the least a method must beat."""
    return position.float()


def streaming(position: Tensor, heavy: Tensor | None, length: Tensor, kept: Tensor) -> Tensor:
    """Four sinks and the newest tokens; small budgets spend at most half on sinks.

    Published code gives keys the position of their slot; here they keep their own, so nothing is rotated twice.
    """
    return position.float().masked_fill(position < (kept // 2).clamp(max=SINKS), torch.inf)


class Evicting(Policy):
    """`kept(n)` slots, filled by a rule, which serves the prompt and every step: before a token comes in, kept - 1 of
    those that are there stay, and it takes the last slot.

    rule(position, heavy, length, kept) -> numbers like position (B, G, N), the largest stay; length and kept (B, 1, 1)
    count the coming token. heavy: whether the rule asks for the attention that tokens have gathered.
    """

    def __init__(
        self, llm: Decoder, budget: float = 0.2, tokens: int | None = None, rule: Callable | None = None,
        name: str = "", heavy: bool = False,
    ):  # fmt: skip
        """budget: share of the tokens at the current length; tokens: instead, that many. ValueError: out of range."""
        super().__init__(llm)
        if not 0 < budget <= 1:
            raise ValueError(f"budget {budget} is outside (0, 1]; 0.2 keeps a fifth of the full cache's bytes")
        if tokens is not None and tokens < 1:
            raise ValueError(f"budget of {tokens} tokens is too small; at least 1")
        self.budget, self.budget_tokens, self.rule, self.heavy = budget, tokens, rule, heavy
        self.name = name or self.name

    def table(self, length: Tensor) -> Tensor:
        """Tokens kept of a sequence, by length."""
        if self.budget_tokens is not None:
            return length.clamp(max=self.budget_tokens)
        return kept_tokens(self.budget, length)

    def kept(self, length: int) -> int:
        """`table` at one length."""
        return int(self.table(torch.tensor(length)))

    def slots(self, lengths: list[int], capacity: int) -> list[int]:
        """Slots of each layer: the most that any sequence asks for at the end."""
        return [self.kept(capacity)] * self.llm.config.layers

    def make_caches(self, lengths: list[int], capacity: int, device) -> dict[str, Cache]:
        slots = self.slots(lengths, capacity)
        return {"LLM": SlotCache(self.llm.config, len(lengths), slots, device, self.llm.dtype, self.heavy)}

    def allocate(self, lengths: list[int], capacity: int) -> None:
        super().allocate(lengths, capacity)
        self.by_length = self.table(torch.arange(capacity + 2)).to(self.llm.device)

    def prompt(self, n: int) -> Prompt:
        """Where a prompt of n tokens is prefilled."""
        return Prompt(self.llm.config, n, self.llm.device, self.llm.dtype, *(1.0,) * self.heavy)

    def prefill(self, b: int, tokens: Tensor, chunk: int, progress=None) -> Tensor:
        prompt = self.prompt(tokens.shape[1])
        logits = read_prompt(self.llm, tokens, prompt, chunk, progress=progress)
        for layer in range(self.llm.config.layers):
            self.cache.take(layer, b, prompt, self.keep(layer, prompt))
        return logits

    def keep(self, layer: int, prompt: Prompt) -> Tensor:
        """Tokens of a prompt that stay in one layer: (G, k), in order."""
        n, device = prompt.capacity, self.llm.device
        kept, position = self.kept(n + 1), torch.arange(n, device=device).expand(self.llm.config.kv_heads, n)
        heavy = prompt.by_kv_head(1.0)[layer] if self.heavy else None
        order = self.rule(position, heavy, *(torch.full((), x, device=device) for x in (n + 1, kept)))
        return order.argsort(dim=-1, descending=True, stable=True)[:, : kept - 1].sort().values

    def plan(self, layer: int, span: Span) -> None:
        position, kept = self.cache.position[layer], self.by_length[span.length.long()][:, None, None]
        heavy = self.cache.heavy[layer] if self.heavy else None
        priority = self.rule(position, heavy, span.length[:, None, None], kept)
        self.cache.make_room(layer, best_slots(priority, position, kept - 1), span.length)


# ---- SnapKV ----------------------------------------------------------------------------------------------------------


class QueryPrompt(Prompt):
    """Keeps the last `window` queries of every layer too, (1, H, window, D) each."""

    def __init__(self, *shape, window: int):
        super().__init__(*shape)
        self.window, self.query = window, [None] * self.config.layers

    def remember(self, layer: int, query: Tensor, key: Tensor) -> None:
        before = [] if self.query[layer] is None else [self.query[layer]]
        self.query[layer] = torch.cat((*before, query), 2)[:, :, -self.window :]


class SnapKV(Evicting):
    """The prompt is compressed once, to what its last queries attend to; every token of the answer is kept.

    The last 32 tokens stay and vote: the sum of their attention on each earlier token, summed over the heads of a
    group, max-pooled over 7 neighbours as in the published LongBench runs. The budget is counted on the prompt, as
    published: a share of it stays, and the answer comes on top, in slots that the ledger shows. Budgets of fewer than
    64 tokens spend half on the observation window.
    """

    name, window, kernel = "snapkv", 32, 7

    def observed(self, prompt: int) -> int:
        """Queries that vote, and newest tokens that stay."""
        return max(1, min(self.window, self.kept(prompt) // 2))

    def slots(self, lengths: list[int], capacity: int) -> list[int]:
        return [max(map(self.kept, lengths)) + capacity - max(lengths)] * self.llm.config.layers

    def prompt(self, n: int) -> QueryPrompt:
        return QueryPrompt(self.llm.config, n, self.llm.device, self.llm.dtype, window=self.observed(n))

    def keep(self, layer: int, prompt: QueryPrompt) -> Tensor:
        n, G = prompt.capacity, self.llm.config.kv_heads
        window, kept = self.observed(n), self.kept(n)
        newest = torch.arange(n - window, n, device=self.llm.device).expand(G, window)
        if kept == window:  # one token: there is nothing to vote on
            return newest
        rows = attention_rows(prompt.query[layer], prompt.key[layer], n - window)  # (1, H, window, n)
        votes = rows[0, :, :, : n - window].sum(1).view(G, -1, n - window).sum(1)  # (G, n - window)
        pooled = F.max_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)
        best = pooled.argsort(dim=-1, descending=True, stable=True)[:, : kept - window]
        return torch.cat((best.sort().values, newest), dim=-1)  # (G, kept)

    def plan(self, layer: int, span: Span) -> None:
        self.cache.make_room(layer, self.cache.position[layer] >= 0, span.length)


# ---- The oracle ------------------------------------------------------------------------------------------------------


class OracleCache(FullCache):
    """A full cache whose steps attend to the tokens of largest attention alone: kept[n] at length n for each KV head;
    or shared by the heads of a layer, each of which has the newest token at least."""

    def __init__(self, *shape, kept: Tensor, shared: bool):
        super().__init__(*shape)
        self.most, self.kept, self.shared = int(kept[self.capacity]), kept.to(self.key.device), shared

    def decode(self, layer: int, query: Tensor, span: Span) -> Tensor:
        key, value, (B, _, H, D) = self.key[layer], self.value[layer], query.shape
        logits = torch.full((B, 1, H, self.capacity), -torch.inf, device=query.device)
        lse = decode_attention(query, key, value, span.length, logits=logits)[1]
        mass = torch.exp2(logits - lse[..., None])[:, 0].unflatten(1, (key.shape[1], -1)).sum(2)  # (B, G, S)
        (_, G, S), token, end = mass.shape, torch.arange(self.capacity, device=mass.device), span.length[:, None, None]
        mass = mass.masked_fill(token >= end, -1)
        together = G if self.shared else 1  # heads that are ranked as one
        mass = mass.masked_fill((token == end - 1) & self.shared, torch.inf)
        best, most = mass.view(B, G // together, -1).topk(together * self.most).indices, self.kept[span.length.long()]
        inside = torch.arange(best.shape[2], device=mass.device) < together * most[:, None, None]  # largest first
        cell = best + S * torch.arange(G // together, device=mass.device)[:, None]  # among the rows of all heads
        owner, cell = (cell // S).where(inside, G).flatten(1), cell.flatten(1)
        rows = (pool.flatten(1, 2).gather(1, cell[..., None].expand(-1, -1, D)) for pool in (key, value))
        return decode_attention(query, *rows, span.length, Slots.sorted(owner, cell % S, G))[0]


class Oracle(Evicting):
    """Exact top-k: every step sees the k tokens of largest attention, found with all keys: what selecting by attention
    can reach. The cache is full, and the ledger says so."""

    def __init__(self, llm: Decoder, budget: float = 0.2, tokens: int | None = None, shared: bool = False):
        super().__init__(llm, budget, tokens, name="oracle-shared" if shared else "oracle")
        self.shared = shared

    def make_caches(self, lengths: list[int], capacity: int, device) -> dict[str, Cache]:
        how = {"kept": self.table(torch.arange(capacity + 2)), "shared": self.shared}
        return {"LLM": OracleCache(self.llm.config, len(lengths), capacity, device, self.llm.dtype, **how)}

    prefill = Policy.prefill
    plan = Policy.plan


# ---- PyramidInfer ----------------------------------------------------------------------------------------------------

DISTANCE_WEIGHT = 1.2  # the newest query counts that much, the oldest of the recent ones 1, as shipped
RECENT_RATIO = 0.2  # recent block as a share of the prompt, as shipped; small budgets have less
LAST_SHARE = 0.1  # of what the first layer keeps of the answer, the last layer keeps this, as shipped
SEGMENT = 16  # tokens of the answer that are thinned at once, as shipped


def cosine(layer: int, layers: int, last: float) -> float:
    """PyramidInfer's schedule, from 1 at the first layer to about `last` at the last one."""
    return (1 - last) * (math.cos(math.pi * layer / layers) + 1) / 2 + last


def contexts(schedule: str, p: float, layers: int, context: int) -> list[int]:
    """Tokens before the recent block that enter each layer, and what leaves the last: layers + 1 numbers.

    Of `context` tokens layer l leaves int(r_l * its own), never none: the ratios compound. r_l is p or `cosine`.
    """
    entering = [context]
    for layer in range(layers):
        ratio = p if schedule == "constant" else cosine(layer, layers, p)
        entering.append(max(min(1, entering[-1]), int(ratio * entering[-1] + 1e-9)))
    return entering


def solve_pyramid(length: int, kept: int, layers: int) -> tuple[list[int], int, bool]:
    """Layer budgets whose mean is at most `kept`, as close as whole tokens allow: contexts, recent block, cut.

    The shipped schedule (cosine to p = 0.9) cannot keep less than about 0.4, as its ratios begin near 1; the paper that
    this is compared in gives 5 to 30 % and no rule. Ours: the recent block is a quarter of the budget, at most the
    shipped fifth of the prompt; the minimum context of 64 tokens goes; the cosine's p is solved while it can reach the
    budget, else one constant ratio is; then, as layer 0 alone would take a small budget, the ratio of a layer also cuts
    its own cache (`cut`), right after its attention.
    """
    recent = int(min(RECENT_RATIO, kept / length / 4) * length + 1e-9) + 1
    for schedule, cut in (("cosine", False), ("constant", True)):

        def stored(p: float) -> int:
            entering = contexts(schedule, p, layers, length - recent)
            return sum(entering[1:] if cut else entering[:-1]) + layers * recent

        if stored(0.0) <= layers * kept or cut:
            break
    low, high = 0.0, 1.0
    if stored(high) <= layers * kept:
        low = high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if stored(middle) <= layers * kept else (low, middle)
    return contexts(schedule, low, layers, length - recent), recent, cut


def answer_shares(share: float, layers: int) -> list[int]:
    """Of SEGMENT generated tokens, how many each layer keeps: cosine to 0.1 as shipped, scaled so that the mean is the
    budget's share (the shipped 0.9 is a mean of one half); above what that reaches, the last share rises until 1 keeps
    all."""
    falling = [cosine(layer, layers, 0.0) for layer in range(layers)]
    mean = sum(falling) / layers
    last = max(LAST_SHARE, (share - mean) / (1 - mean) if mean < 1 else 0.0)
    shape = [cosine(layer, layers, last) for layer in range(layers)]
    scale = min(1.0, share * layers / sum(shape))
    return [max(1, int(SEGMENT * scale * ratio + 1e-6)) for ratio in shape]


class Lengths:
    """How many tokens each layer holds of one sequence: known before the first step, whatever the attention says."""

    def __init__(self, kept: int, prompt: int, layers: int):
        self.contexts, self.block, self.cut = solve_pyramid(prompt, kept, layers)
        self.ratio = min(RECENT_RATIO, kept / prompt / 4)
        self.held = [context + self.block for context in (self.contexts[1:] if self.cut else self.contexts[:-1])]
        self.settled = list(self.held)  # the prompt, and what has been thinned of the answer
        self.keep = answer_shares(kept / prompt, layers)

    def step(self) -> tuple[int, list[bool]]:
        """Make room for one more token: the recent block R', and in which layers SEGMENT tokens are thinned."""
        recent = int(self.ratio * self.held[0] + 1e-9)
        due = [held - recent - settled >= SEGMENT for held, settled in zip(self.held, self.settled)]
        for layer, thinned in enumerate(due):
            if thinned:
                self.held[layer] -= SEGMENT - self.keep[layer]
                self.settled[layer] = self.held[layer] - recent
            self.held[layer] += 1
        return recent, due


@lru_cache(maxsize=1)  # a session asks several times, and a long answer has many steps
def schedule(
    kept: tuple[int, ...], lengths: tuple[int, ...], steps: int, layers: int
) -> tuple[list[Lengths], list[list], list[int]]:
    """Of prompts of these lengths: the counts after the prompt, each step's (recent, due), and every layer's slots."""
    starts = [Lengths(count, n, layers) for count, n in zip(kept, lengths)]
    slots, every = [1] * layers, []
    for count in (Lengths(count, n, layers) for count, n in zip(kept, lengths)):
        own, slots = [], [max(pair) for pair in zip(slots, count.held)]
        for _ in range(steps):
            own.append(count.step())
            slots = [max(pair) for pair in zip(slots, count.held)]
        every.append(own)
    return starts, every, slots


class PyramidPrompt(Cache):
    """PyramidInfer's prefill of one whole prompt: after a layer's attention, the context that matters least leaves.

    Published code takes the hidden states of the dropped tokens out. Here they go on, as rows that no other token
    attends to and whose attention is not computed: the same numbers and the same cache; what is not saved is the MLP.
    """

    def __init__(self, config: Config, count: Lengths, device):
        self.config, self.count = config, count
        self.alive = torch.arange(count.contexts[0] + count.block, device=device)  # positions that enter the layer
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []  # a layer: K and V (1, G, kept, D), positions (kept,)

    def attend(self, layer: int, qkv: Tensor, rope: Rope, span: Span) -> Tensor:
        heads = rotate(qkv, rope, self.config.kv_heads, self.config.head_dim)
        query, key, value = (x.transpose(1, 2)[:, :, self.alive] for x in heads)  # (1, heads, m, D)
        out = torch.zeros_like(heads[0])
        out[:, self.alive] = causal_attention(query, key, value).transpose(1, 2)
        context, wanted = self.count.contexts[layer : layer + 2]
        stays = torch.arange(len(self.alive), device=query.device)
        if wanted < context:
            best = self._weights(query, key)[:context].argsort(descending=True, stable=True)[:wanted]
            stays = torch.cat((best.sort().values, stays[context:]))
        stored = stays if self.count.cut else slice(None)
        self.kept.append((key[:, :, stored], value[:, :, stored], self.alive[stored]))
        self.alive = self.alive[stays]
        return out

    def _weights(self, query: Tensor, key: Tensor) -> Tensor:
        """What the recent queries attend to, mean over heads, newer queries more: (m,); sinks rank first."""
        m = query.shape[2]
        first = m - self.count.block
        weight = torch.linspace(1.0, DISTANCE_WEIGHT, self.count.block, device=query.device)  # oldest first
        total = torch.zeros(m, device=query.device)
        for start in range(first, m, SCORE_BLOCK):
            end = min(m, start + SCORE_BLOCK)
            rows = attention_rows(query[:, :, start:end], key[:, :, :end], start)[0].mean(0)  # (T, end)
            total[:end] += weight[start - first : end - first] @ rows
        total[:SINKS] = torch.inf
        return total


class PyramidCache(SlotCache):
    """Slots with the newest attention rows (B, R, N) of a layer, oldest first, mean over all heads."""

    tables, weighs = {**SlotCache.tables, "recent rows": ("rows",)}, True

    def __init__(self, config: Config, batch: int, slots: list[int], rows: int, device, dtype: torch.dtype):
        super().__init__(config, batch, slots, device, dtype)
        self.rows = [torch.zeros(batch, rows, count, device=device) for count in slots]

    def weigh(self, layer: int, logits: Tensor, lse: Tensor) -> None:
        row = torch.exp2(logits - lse[..., None]).mean(1, keepdim=True)
        self.rows[layer].copy_(torch.cat((self.rows[layer][:, 1:], row), 1))


class PyramidInfer(Evicting):
    """Deeper layers keep less: in the prefill each layer drops the context that the recent queries do not attend to.

    One token set a layer, for all its heads. In decoding, by the legacy rule of the published code
    (`modeling_llama_pyramidinfer_legacy.py`; the later port compresses by the wrong length once it has begun): once 16
    tokens of the answer are older than the recent block, the best of them stay, by the weighted rows of the recent
    queries; the prompt is not touched again. The budget is the mean over layers of the share of the prompt that is kept
    (`solve_pyramid`), and about the same share of the answer beside its recent block.
    """

    name, whole_prompt = "pyramidinfer", True

    def _schedule(self, lengths: list[int], capacity: int) -> tuple[list[Lengths], list[list], list[int]]:
        kept = tuple(self.kept(n) for n in lengths)
        return schedule(kept, tuple(lengths), capacity - max(lengths), self.llm.config.layers)

    def make_caches(self, lengths: list[int], capacity: int, device) -> dict[str, Cache]:
        _, steps, slots = self._schedule(lengths, capacity)
        rows = 1 + max((recent for own in steps for recent, _ in own), default=0)
        return {"LLM": PyramidCache(self.llm.config, len(lengths), slots, rows, device, self.llm.dtype)}

    def allocate(self, lengths: list[int], capacity: int) -> None:
        super().allocate(lengths, capacity)
        self.starts, steps, slots = self._schedule(lengths, capacity)
        recent = [[own[0] for own in step] for step in zip(*steps)] or [[0] * len(lengths)]
        due = [[own[1] for own in step] for step in zip(*steps)] or [[[False] * len(slots)] * len(lengths)]
        self.recent, self.due = (torch.tensor(table, device=self.llm.device) for table in (recent, due))
        self.share = torch.tensor([count.keep for count in self.starts], device=self.llm.device)  # (B, L)
        self.at = torch.zeros((), dtype=torch.long, device=self.llm.device)  # the step at hand

    def prefill(self, b: int, tokens: Tensor, chunk: int, progress=None) -> Tensor:
        prompt = PyramidPrompt(self.llm.config, self.starts[b], self.llm.device)
        logits = read_prompt(self.llm, tokens, prompt, chunk, progress=progress)
        for layer, (key, value, position) in enumerate(prompt.kept):
            pools = self.cache.key, self.cache.value, self.cache.position
            for pool, made in zip(pools, (key[0], value[0], position.int())):
                pool[layer][b, :, : len(position)] = made
        return logits

    def plan(self, layer: int, span: Span) -> None:
        position, rows = self.cache.position[layer], self.cache.rows[layer]  # (B, G, N), (B, R, N)
        step = self.at.expand(1)
        recent, due, device = self.recent[step].T, self.due[step][0, :, layer, None], rows.device  # (B, 1)
        older = recent + torch.arange(SEGMENT, device=device)  # the 16 tokens just older than the recent block
        newest_first = position[:, 0].argsort(descending=True)
        segment = newest_first.gather(1, older.clamp(max=position.shape[2] - 1))  # (B, 16) slots
        age = torch.arange(rows.shape[1] - 1, -1, -1, device=device)
        weight = 1 + (DISTANCE_WEIGHT - 1) * (recent - age) / recent.clamp(min=1)  # (B, R), newer queries more
        weight = weight.where(age <= recent, 0)
        score = (weight[:, :, None] * rows.gather(2, segment[:, None].expand(-1, rows.shape[1], -1))).sum(1)  # (B, 16)
        rank = score.argsort(descending=True).argsort(-1)
        leaves = (rank >= self.share[:, layer, None]) & due
        stays = (position[:, 0] >= 0).scatter(1, segment, ~leaves)[:, None]
        self.cache.make_room(layer, (position >= 0) & stays, span.length)

    def settle(self, span: Span, kept: Tensor | None = None) -> None:
        self.at += 1


BASELINES = {
    "h2o": partial(Evicting, rule=heavy_order, name="h2o", heavy=True),
    "pyramidinfer": PyramidInfer,
    "streaming": partial(Evicting, rule=streaming, name="streaming"),
    "snapkv": SnapKV,
    "oracle": Oracle,
    "oracle-shared": partial(Oracle, shared=True),
    "window": partial(Evicting, rule=window, name="window"),
}
