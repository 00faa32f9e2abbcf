"""The caches: full, scored (the SLM's), slots without a way back, and the LLM's three tiers. And their ledger.

Where it sits: SLM -> scores (`ScoredCache`) -> tier plan -> **migration** (`TieredCache`) -> LLM. A model knows of a
cache only `attend`; a cache is made for a number of positions known at the start.

| cache         | keeps                                                                       | used by               |
| ------------- | --------------------------------------------------------------------------- | --------------------- |
| `FullCache`   | K and V of every token; token j is in slot j                                | full cache, prefills  |
| `ScoredCache` | the same, the newest attention rows, and scores (Eq. 1)                     | the SLM               |
| `Prompt`      | the same for one prompt, while it is prefilled for a cache with slots       | tiers, baselines      |
| `SlotCache`   | K and V of the tokens that stay, in slots                                   | baselines             |
| `CutCache`    | the same, with scores (`--slm-budget`, appendix A.3)                        | the SLM               |
| `TieredCache` | critical K and V, marginal V, in slots; K and V of every token, offloaded   | the LLM (Section 4)   |

The ledger of a cache is the list of its tensors. What a cache would take is asked of the same cache on the meta device,
which allocates nothing.

Shapes follow the legend in model.py.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import NEGLIGIBLE, causal_attention, column_sums, decode_attention
from model import Config, Span
from ops import Rope, rope_append
from scores import add_weights
from tiers import bring_rows, plan_tiers, store_rows


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the attention rows that a model of this dtype keeps. In fp16 a weight is known to a hundredth while its logit
    is below 64, to a tenth below 512."""
    return torch.float16 if dtype.itemsize == 2 else torch.float32


@dataclass(frozen=True)
class Entry:
    """One line of a ledger: bytes of one kind, on the model's device or on the host."""

    what: str
    host: bool
    size: int


class Cache:
    """What all caches share: the names of their tensors, for the ledger; and the hook of a prefill.

    tables: kind -> names of attributes, each a tensor or a list of them. observe(layer, query (1, H, T, D), key (1, G,
    T, D)), if set, is shown what a prefill attends with.
    """

    tables: dict[str, tuple[str, ...]] = {}
    observe = None

    def ledger(self) -> list[Entry]:
        entries = []
        for what, names in self.tables.items():
            held = [getattr(self, name) for name in names]
            tensors = [t for x in held if x is not None for t in (x if isinstance(x, list) else [x])]
            if tensors:
                entries.append(Entry(what, self.on_host(what), sum(tensor.nbytes for tensor in tensors)))
        return entries

    def on_host(self, what: str) -> bool:
        return False


class FullCache(Cache):
    """K and V of every token, (L, B, G, S, D) each."""

    tables = {"full K, V": ("key", "value")}

    def __init__(self, config: Config, batch: int, capacity: int, device, dtype: torch.dtype):
        self.config, self.capacity = config, capacity
        shape = (config.layers, batch, config.kv_heads, capacity, config.head_dim)
        self.key, self.value = (torch.empty(shape, device=device, dtype=dtype) for _ in "kv")

    def staging(self, b: int, length: int) -> "FullCache":
        """Where the prompt of sequence b is prefilled: the same memory, seen as the cache of that sequence alone."""
        view = copy.copy(self)
        view.key, view.value = self.key[:, b : b + 1], self.value[:, b : b + 1]
        return view

    def load(self, b: int, staged: "FullCache") -> None:
        """Take over the prefilled prompt of sequence b: it was written in place."""

    def attend(self, layer: int, qkv: Tensor, rope: Rope, span: Span) -> Tensor:
        """Append K and V of the new tokens, attend to all; (B, T, H, D)."""
        query = rope_append(qkv, rope, self.key[layer], self.value[layer], span.positions)
        if span.past is None:
            return self.decode(layer, query, span)
        return self.prefill(layer, query.transpose(1, 2), span).transpose(1, 2)

    def decode(self, layer: int, query: Tensor, span: Span) -> Tensor:
        return decode_attention(query, self.key[layer], self.value[layer], span.length)[0]

    def prefill(self, layer: int, query: Tensor, span: Span) -> Tensor:
        """A chunk of one prompt: query (1, H, T, D) on all tokens so far; (1, H, T, D)."""
        end = span.past + query.shape[2]
        key, value = self.key[layer, :, :, :end], self.value[layer, :, :, :end]
        if self.observe is not None:
            self.observe(layer, query, key[:, :, span.past :])
        self.remember(layer, query, key)
        return causal_attention(query, key, value)

    def remember(self, layer: int, query: Tensor, key: Tensor) -> None:
        """What a subclass keeps of a chunk's attention."""


class Scores:
    """What attention says of every token, by position; the SLM's caches have it.

    logits (T, L, B, H, S) and lse (T, L, B, H): the newest rows, weights are 2 ** (logits - lse) (scores.py); T = 1 but
    for drafts, `at` says which of them the next step writes. score (L, B, H, S) fp32: decay * score + row after every
    `fold`; decay 1 is Eq. 1's accumulation; None (decay 0): nothing of the past counts.
    """

    def make_scores(self, config: Config, batch: int, capacity: int, device, dtype, decay: float, rows: int) -> None:
        shape = (config.layers, batch, config.query_heads, capacity)
        self.decay, self.at = decay, 0
        self.logits = torch.full((rows, *shape), -torch.inf, device=device, dtype=logits_dtype(dtype))
        self.lse = torch.zeros(rows, *shape[:3], device=device)
        self.score = torch.zeros(shape, device=device) if decay else None

    def fold(self, length: Tensor, kept: Tensor | None = None) -> None:
        """The newest rows go into the score, one after the other. length (B,): tokens with the first new one; kept (B,)
        int32: of a sequence's T rows so many count."""
        if self.score is None:
            return
        for t in range(len(self.logits)):
            seen = length + t if kept is None else (length + t).where(kept > t, 0)
            rows = self.score, self.logits[t], self.lse[t]
            add_weights(*(table.flatten(0, 1) for table in rows), self.decay, seen)


class ScoredCache(Scores, FullCache):
    """A full cache that also keeps what attention says of every token; the SLM's."""

    tables = {**FullCache.tables, "scores": ("logits", "lse", "score")}

    def __init__(
        self, config: Config, batch: int, capacity: int, device, dtype: torch.dtype, decay: float, rows: int = 1
    ):
        super().__init__(config, batch, capacity, device, dtype)
        self.make_scores(config, batch, capacity, device, dtype, decay, rows)

    def staging(self, b: int, length: int) -> "ScoredCache":
        view = super().staging(b, length)
        view.score = None if self.score is None else self.score[:, b : b + 1]
        return view

    def decode(self, layer: int, query: Tensor, span: Span) -> Tensor:
        row = self.logits[self.at, layer][:, None], self.lse[self.at, layer][:, None]  # (B, 1, H, S), (B, 1, H)
        return decode_attention(query, self.key[layer], self.value[layer], span.length, None, *row)[0]

    def remember(self, layer: int, query: Tensor, key: Tensor) -> None:
        """Column sums of a chunk's attention (Eq. 1)."""
        if self.score is not None:
            score = self.score[layer, :, :, : key.shape[2]]
            score.mul_(self.decay ** query.shape[2]).add_(column_sums(query, key, self.decay))


class Prompt(FullCache):
    """Where one prompt of n tokens is prefilled before a cache with slots takes its rows. sums: decay -> (L, 1, H, n)
    fp32, the column sums of its attention (Eq. 1)."""

    def __init__(self, config: Config, length: int, device, dtype: torch.dtype, *decays: float):
        super().__init__(config, 1, length, device, dtype)
        shape = (config.layers, 1, config.query_heads, length)
        self.sums = {decay: torch.zeros(shape, device=device) for decay in decays}

    def remember(self, layer: int, query: Tensor, key: Tensor) -> None:
        T, end = query.shape[2], key.shape[2]
        for decay, sums in self.sums.items():
            if decay ** (self.capacity - end) >= NEGLIGIBLE:  # else nothing of this chunk is left at the prompt's end
                sums[layer, :, :, :end].mul_(decay**T).add_(column_sums(query, key, decay))

    def by_kv_head(self, decay: float) -> Tensor:
        """The sums over the query heads of each KV head: (L, G, n)."""
        return self.sums[decay][:, 0].unflatten(1, (self.config.kv_heads, -1)).sum(2)


# ---- Slots without a way back ----------------------------------------------------------------------------------------


class SlotCache(Cache):
    """K and V of what a method keeps, in slots; what leaves is gone. Lists over layers: some methods keep less in
    deeper ones. position[l] (B, G, N) int32: the token in each slot, -1 for none; N differs between layers.

    heavy[l] (B, G, N) fp32, if asked for: the attention that a slot's token has gathered since it came, summed over the
    query heads of the group (H2O).
    """

    tables = {"kept K, V": ("key", "value"), "scores": ("heavy",), "slot tables": ("position", "newest")}
    heavy = None
    weighs = False  # whether `weigh` wants a step's attention rows

    def __init__(self, config: Config, batch: int, slots: list[int], device, dtype: torch.dtype, heavy: bool = False):
        self.config, self.dtype = config, dtype
        shapes = [(batch, config.kv_heads, count) for count in slots]
        for name in ("key", "value"):
            setattr(self, name, [torch.empty(*s, config.head_dim, device=device, dtype=dtype) for s in shapes])
        self.position = [torch.full(shape, -1, dtype=torch.int32, device=device) for shape in shapes]
        self.newest = [torch.zeros(*shape[:2], 1, dtype=torch.int32, device=device) for shape in shapes]
        if heavy:
            self.weighs = True
            self.heavy = [torch.zeros(shape, device=device) for shape in shapes]

    def take(self, layer: int, b: int, prompt: Prompt, kept: Tensor) -> None:
        """Of a prefilled prompt the tokens kept (G, k), in order."""
        count, rows = kept.shape[1], kept[..., None].expand(-1, -1, self.config.head_dim)
        for pool, made in ((self.key, prompt.key), (self.value, prompt.value)):
            pool[layer][b, :, :count] = made[layer][0].gather(1, rows)
        self.position[layer][b, :, :count] = kept.int()
        if self.heavy is not None:
            self.heavy[layer][b, :, :count] = prompt.by_kv_head(1.0)[layer].gather(1, kept)

    def make_room(self, layer: int, stays: Tensor, length: Tensor) -> None:
        """Slots that are not in `stays` (B, G, N) are free; the newest token, at length - 1, takes the first of
        them."""
        position = self.position[layer].masked_fill_(~stays, -1)
        slot = (position < 0).byte().argmax(-1, keepdim=True)  # (B, G, 1)
        position.scatter_(2, slot, (length - 1)[:, None, None].expand_as(slot))
        self.newest[layer].copy_(slot)
        if self.heavy is not None:
            self.heavy[layer].masked_fill_(~stays, 0)

    def attend(self, layer: int, qkv: Tensor, rope: Rope, span: Span) -> Tensor:
        """Put the newest K and V into their slot, attend to the slots; (B, 1, H, D)."""
        key, value, position = self.key[layer], self.value[layer], self.position[layer]
        query = rope_append(qkv, rope, key, value, span.positions, self.newest[layer])
        logits = torch.empty(*query.shape[:3], position.shape[2], device=query.device) if self.weighs else None
        out, lse = decode_attention(query, key, value, span.length, position, logits)
        if self.weighs:
            self.weigh(layer, logits[:, 0], lse[:, 0])
        return out

    def weigh(self, layer: int, logits: Tensor, lse: Tensor) -> None:
        """The attention row by slot: logits (B, H, N), lse (B, H)."""
        add_weights(self.heavy[layer], logits, lse, 1.0, None)

    def tokens(self, b: int) -> dict[str, float]:
        """Tokens of sequence b in the slots, mean over layers and KV heads."""
        held = [(position[b] >= 0).sum(-1).float().mean().item() for position in self.position]
        return {"critical": sum(held) / len(held)}


def kept_tokens(share: float, length: Tensor) -> Tensor:
    """Tokens that a share of a sequence keeps, by length, int64: the coming one at least."""
    return (share * length.double() + 1e-9).long().clamp(min=1)


def heavy_order(position: Tensor, heavy: Tensor, length: Tensor, kept: Tensor) -> Tensor:
    """H2O's rule (arXiv 2306.14048) as numbers (..., N), the largest stay: the newest half of `kept`, then by attention
    gathered. position, heavy (..., N); length and kept count the coming token."""
    return heavy.masked_fill(position >= length - (kept - kept // 2), torch.inf)


def best_slots(priority: Tensor, position: Tensor, count: Tensor) -> Tensor:
    """Mask (B, G, N) of the `count` slots of the largest priority, equal ones by slot; a free one is never among
    them."""
    rank = priority.masked_fill(position < 0, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (position >= 0) & (rank < count)


class CutCache(Scores, SlotCache):
    """The SLM's cache cut to a share of its tokens (`--slm-budget`, appendix A.3, Table 5) by H2O's rule.

    K and V lie in slots; scores by position, where a dropped token has none: it ranks last and nothing is borrowed from
    it.
    """

    tables = {**SlotCache.tables, "scores": ("heavy", "logits", "lse", "score")}

    def __init__(
        self, config: Config, batch: int, capacity: int, device, dtype: torch.dtype, decay: float, share: float
    ):
        kept = kept_tokens(share, torch.arange(capacity + 2))
        super().__init__(config, batch, [int(kept[capacity])] * config.layers, device, dtype, heavy=True)
        self.make_scores(config, batch, capacity, device, dtype, decay, 1)
        self.by_length, self.kept = kept.tolist(), kept.to(device)  # for the host, for the device

    def staging(self, b: int, length: int) -> Prompt:
        device = self.position[0].device
        return Prompt(self.config, length, device, self.dtype, *{self.decay, 1.0} - {0.0})

    def load(self, b: int, prompt: Prompt) -> None:
        """Take the tokens that leave a slot for the first one to come."""
        n = prompt.capacity
        kept, token = self.by_length[n + 1], torch.arange(n, device=self.kept.device)
        for layer, heavy in enumerate(prompt.by_kv_head(1.0)):  # (G, n)
            order = heavy_order(token, heavy, n + 1, kept).argsort(dim=-1, descending=True, stable=True)
            stays = order[:, : kept - 1].sort(-1).values
            self.take(layer, b, prompt, stays)
            if self.score is not None:
                self.score[layer, b, :, :n] = prompt.sums[self.decay][layer, 0]
                self._forget(layer)

    def attend(self, layer: int, qkv: Tensor, rope: Rope, span: Span) -> Tensor:
        position, length = self.position[layer], span.length[:, None, None]
        kept = self.kept[span.length.long()][:, None, None]
        priority = heavy_order(position, self.heavy[layer], length, kept)
        self.make_room(layer, best_slots(priority, position, kept - 1), span.length)
        if self.score is not None:
            self._forget(layer)
        return super().attend(layer, qkv, rope, span)

    def _forget(self, layer: int) -> None:
        """Tokens in no slot have no score."""
        held = self._by_position(torch.ones_like(self.heavy[layer]), layer, 0.0)  # (B, G, S)
        self.score[layer].mul_(held.repeat_interleave(self.config.query_heads // self.config.kv_heads, 1))

    def _by_position(self, rows: Tensor, layer: int, empty: float) -> Tensor:
        """Rows (B, h, N) by slot -> (B, h, S) by position."""
        position = self.position[layer].repeat_interleave(rows.shape[1] // self.config.kv_heads, 1)
        out = torch.full((*rows.shape[:2], self.logits.shape[-1]), empty, device=rows.device)
        rows = rows.where(position >= 0, empty)
        return out.scatter_reduce_(-1, position.clamp(min=0).long(), rows, "amax")

    def weigh(self, layer: int, logits: Tensor, lse: Tensor) -> None:
        super().weigh(layer, logits, lse)
        self.logits[0, layer], self.lse[0, layer] = self._by_position(logits, layer, -torch.inf), lse


# ---- Three tiers -----------------------------------------------------------------------------------------------------


class TieredCache(Cache):
    """The LLM's cache in three tiers, chosen anew at every step for each sequence, layer and KV head.

    Critical tokens have K and V in slots on the device, key and value (L, B, G, C, D); marginal tokens V alone,
    marginal (L, B, G, M, D); critical_position (L, B, G, C) and marginal_position (L, B, G, M) int32 say which token is
    in a slot, -1 for none. K and V of every token lie side by side in the offloaded tier (L, B, G, S', 2, D), written
    once, in the step after the token was made: on the host (offload "cpu", pinned on a GPU's machine), or on the device
    too ("none"). So leaving a slot copies nothing, and what comes back is the same to the bit.

    memory (L, B, G, S) fp32, with a decay: what the LLM's own attention says of tokens, `Settings.scores` "fused"; it
    is as it was before the newest rows, logits (L, B, T, H, C) and lse (L, B, T, H), which the next plan folds in.
    """

    tables = {
        "critical K, V": ("key", "value"), "marginal V": ("marginal",), "offloaded K, V": ("offloaded",),
        "scores": ("memory", "logits", "lse", "borrowed"),
        "slot tables": ("critical_position", "marginal_position", "newest", "start", "rows", "count", "mark"),
    }  # fmt: skip

    def __init__(
        self, config: Config, batch: int, capacity: int, critical: int, marginal: int, device, dtype: torch.dtype,
        decay: float | None, tokens: int = 1, offload: str = "cpu",
    ):  # fmt: skip
        """critical, marginal: slots; tokens: T, of a step. decay: of the memory; None: there is none."""
        device = torch.device(device)
        base = (config.layers, batch, config.kv_heads)
        self.config, self.capacity, self.decay, self.offload = config, capacity, decay, offload
        pool = {"device": device, "dtype": dtype}
        self.key, self.value = (torch.empty(*base, critical, config.head_dim, **pool) for _ in "kv")
        self.marginal = torch.empty(*base, marginal, config.head_dim, **pool) if marginal else None
        table = {"device": device, "dtype": torch.int32}
        self.critical_position = torch.full((*base, critical), -1, **table)
        self.marginal_position = torch.full((*base, marginal), -1, **table) if marginal else None
        self.newest = torch.zeros(*base, tokens, **table)  # slots of the newest tokens
        self.start = torch.full((batch,), -1, **table)  # the position of the first of them; -1 before the first step
        # An odd number of rows a KV head: else one step's rows fall on few lines of the host's caches.
        shape = (*base, capacity | 1, 2, config.head_dim)
        if offload == "cpu" and device.type == "cuda":
            self.offloaded = torch.empty(shape, dtype=dtype, pin_memory=True)
        else:
            self.offloaded = torch.empty(shape, **pool)
        self.memory = None if decay is None else torch.zeros(*base, capacity, device=device)
        heads = (config.layers, batch, tokens, config.query_heads)
        self.borrowed = torch.zeros(*heads, marginal, device=device) if marginal else None  # (L, B, T, H, M)
        self.logits = self.lse = None
        if decay is not None:
            self.logits = torch.empty(*heads, critical, device=device, dtype=logits_dtype(dtype))
            self.lse = torch.empty(heads, device=device)
        self.moved = torch.zeros(config.layers, 2, dtype=torch.int64, device=device)  # rows brought so far, by tier
        # What a plan wants brought (tiers.plan_tiers), of all layers: a layer's rows may be under way while later ones
        # plan.
        self.rows = torch.zeros(config.layers, 2, 2, batch * config.kv_heads * max(critical, marginal), **table)
        self.count = torch.zeros(config.layers, 2, **table)
        self.mark = torch.zeros(base[1:] + (capacity,), dtype=torch.int8, device=device)

    def on_host(self, what: str) -> bool:
        return what.startswith("offloaded") and self.offload == "cpu"

    def staging(self, b: int, length: int) -> Prompt:
        decays = () if self.decay is None else (self.decay,)
        return Prompt(self.config, length, self.key.device, self.key.dtype, *decays)

    def load(self, b: int, prompt: Prompt) -> None:
        """Take a prefilled prompt: K and V into the offloaded tier, whence the first plan brings what it wants."""
        n = prompt.capacity
        if self.memory is not None:
            self.memory[:, b, :, :n] = prompt.by_kv_head(self.decay)
        for layer in range(self.config.layers):
            both = torch.stack((prompt.key[layer, 0], prompt.value[layer, 0]), 2)  # (G, n, 2, D)
            for g, rows in enumerate(both):  # a KV head lies in one piece: a straight copy that nothing waits for
                self.offloaded[layer, b, g, :n].copy_(rows, non_blocking=True)

    def fold(self, layer: int) -> None:
        """What the newest token attended to in this layer goes into the memory; the first time no slot holds a
        token."""
        row = self.logits[layer, :, 0], self.lse[layer, :, 0]
        add_weights(self.memory[layer], *row, self.decay, None, self.critical_position[layer])

    def place(self, layer: int, total: Tensor, sizes: Tensor, length: Tensor, memory: bool) -> None:
        """Choose the tiers of a layer by `total` (B, G, S) and give them slots (tiers.plan_tiers). memory: tokens that
        are not critical are remembered with their totals. Before that the tokens of the last step, whose rows the pools
        alone have, go into the offloaded tier."""
        store_rows(self.key[layer], self.value[layer], self.offloaded[layer], self.newest[layer], self.start)
        middle = self.marginal_position
        plan_tiers(
            total, length, sizes, self.critical_position[layer], None if middle is None else middle[layer],
            self.memory[layer] if memory else None, self.newest[layer], self.rows[layer], self.count[layer],
            self.mark, self.offloaded.shape[3],
        )  # fmt: skip

    def migrate(self, layer: int) -> None:
        """Bring the rows that the layer's plan asks for."""
        rows, count, offloaded = self.rows[layer], self.count[layer], self.offloaded[layer]
        bring_rows(self.key[layer], self.value[layer], offloaded, rows[0], count[0])
        if self.marginal is not None:
            bring_rows(None, self.marginal[layer], offloaded, rows[1], count[1])

    def settle(self, start: Tensor) -> None:
        """The step of the tokens from position start (B,) on is over: what was brought is counted."""
        self.start.copy_(start)
        self.moved += self.count
        self.count.zero_()

    def attend(self, layer: int, qkv: Tensor, rope: Rope, span: Span) -> Tensor:
        """Put K and V of the new tokens into their slots, then attend (Eq. 6); (B, T, H, D)."""
        query = rope_append(qkv, rope, self.key[layer], self.value[layer], span.positions, self.newest[layer])
        row = (None, None) if self.logits is None else (self.logits[layer], self.lse[layer])
        middle = (None, None) if self.marginal is None else (self.borrowed[layer], self.marginal[layer])
        pools = self.key[layer], self.value[layer]
        return decode_attention(query, *pools, span.length, self.critical_position[layer], *row, *middle)[0]

    def free_from(self, end: Tensor) -> None:
        """Free the slots of tokens at or beyond a sequence's end (B,): drafts that were refused."""
        self.critical_position.masked_fill_(self.critical_position >= end[:, None, None], -1)

    def tokens(self, b: int) -> dict[str, float]:
        """Tokens of sequence b in each tier's slots, mean over layers and KV heads."""
        tables = {"critical": self.critical_position, "marginal": self.marginal_position}
        return {
            tier: 0.0 if table is None else (table[:, b] >= 0).sum(-1).float().mean().item()
            for tier, table in tables.items()
        }

    def row_bytes(self, critical: int, marginal: int) -> int:
        """Bytes of rows brought from the offloaded tier: K and V of critical ones, V of marginal ones."""
        return (2 * critical + marginal) * self.config.head_dim * self.offloaded.itemsize
