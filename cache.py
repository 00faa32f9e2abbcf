"""The caches: full, scored (the SLM's), and the LLM's three tiers. And their ledger.

Where it sits: SLM -> scores (`ScoredCache`) -> tier plan -> **migration** (`TieredCache`) -> LLM. A model knows of a
cache only `attend`; a cache is made for a number of positions known at the start.

| cache         | keeps                                                                       | used by               |
| ------------- | --------------------------------------------------------------------------- | --------------------- |
| `FullCache`   | K and V of every token; token j is in slot j                                | full cache, prefills  |
| `ScoredCache` | the same, the newest attention rows, and scores (Eq. 1)                     | the SLM               |
| `Prompt`      | the same for one prompt, while it is prefilled for a cache with slots       | tiers, baselines      |
| `TieredCache` | critical K and V, marginal V, in slots; K and V of every token, offloaded   | the LLM (Section 4)   |

Caches whose tokens have no way back stand in evicting.py.

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
from ops import Rope, Slots, bring_rows, rope_append, store_rows
from scores import add_held, add_weights
from tiers import LEVELS, plan_tiers


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

    tables: kind -> names of attributes, each a tensor or several. observe(layer, query (1, H, T, D), key (1, G,
    T, D)), if set, is shown what a prefill attends with.
    """

    tables: dict[str, tuple[str, ...]] = {}
    observe = None

    def ledger(self) -> list[Entry]:
        entries = []
        for what, names in self.tables.items():
            held = [getattr(self, name) for name in names]
            tensors = [t for x in held if x is not None for t in (x if isinstance(x, (list, Slots)) else [x])]
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


# ---- Three tiers -----------------------------------------------------------------------------------------------------


class TieredCache(Cache):
    """The LLM's cache in three tiers, chosen anew at every step for each sequence, layer and KV head.

    Critical tokens have K and V in slots on the device, key and value (L, B, N, D); marginal tokens V alone, marginal
    (L, B, M, D). The KV heads of a layer share the slots: critical_slots and marginal_slots (ops.Slots, with L in
    front) say which token of which head is where. K and V of every token lie side by side in the offloaded tier (L, B,
    G, S', 2, D), written once, in the step after the token was made: on the host (offload "cpu", pinned on a GPU's
    machine), or on the device too ("none"). So leaving a slot copies nothing, and what comes back is the same to the
    bit.

    memory (L, B, G, S) fp32, with a decay: what the LLM's own attention says of tokens, `Settings.scores` "fused"; it
    is as it was before the newest rows, logits (L, B, T, H/G, N) and lse (L, B, T, H), which the next plan folds in.
    """

    tables = {
        "critical K, V": ("key", "value"), "marginal V": ("marginal",), "offloaded K, V": ("offloaded",),
        "scores": ("memory", "logits", "lse", "borrowed"),
        "slot tables": ("critical_slots", "marginal_slots", "newest", "start", "rows", "count", "mark", "levels"),
    }  # fmt: skip

    def __init__(
        self, config: Config, batch: int, capacity: int, critical: int, marginal: int, device, dtype: torch.dtype,
        decay: float | None, tokens: int = 1, offload: str = "cpu", shared: bool = True,
    ):  # fmt: skip
        """critical, marginal: slots for each KV head; shared: a head may take more, and another less. tokens: T, of a
        step. decay: of the memory; None: there is none."""
        device = torch.device(device)
        base = (config.layers, batch, config.kv_heads)
        self.config, self.capacity, self.decay = config, capacity, decay
        self.offload, self.shared = offload, shared
        critical, marginal = critical * config.kv_heads, marginal * config.kv_heads
        pool = {"device": device, "dtype": dtype}
        self.key, self.value = (torch.empty(*base[:2], critical, config.head_dim, **pool) for _ in "kv")
        self.marginal = torch.empty(*base[:2], marginal, config.head_dim, **pool) if marginal else None
        table = {"device": device, "dtype": torch.int32}
        self.critical_slots = Slots.free(*base, critical, device)
        self.marginal_slots = Slots.free(*base, marginal, device) if marginal else None
        self.newest = torch.zeros(*base, tokens, **table)  # slots of the newest tokens
        self.start = torch.full((batch,), -1, **table)  # the position of the first of them; -1 before the first step
        # An odd number of rows a KV head: else one step's rows fall on few lines of the host's caches.
        shape = (*base, capacity | 1, 2, config.head_dim)
        if offload == "cpu" and device.type == "cuda":
            self.offloaded = torch.empty(shape, dtype=dtype, pin_memory=True)
        else:
            self.offloaded = torch.empty(shape, **pool)
        self.memory = None if decay is None else torch.zeros(*base, capacity, device=device)
        heads = (config.layers, batch, tokens, config.query_heads // config.kv_heads)
        self.borrowed = torch.zeros(*heads, marginal, device=device) if marginal else None  # (L, B, T, H/G, M)
        self.logits = self.lse = None
        if decay is not None:
            self.logits = torch.empty(*heads, critical, device=device, dtype=logits_dtype(dtype))
            self.lse = torch.empty(*heads[:3], config.query_heads, device=device)
        self.moved = torch.zeros(config.layers, 2, dtype=torch.int64, device=device)  # rows brought so far, by tier
        # What a plan wants brought (tiers.plan_tiers), of all layers: a layer's rows may be under way while later ones
        # plan.
        self.rows = torch.zeros(config.layers, 2, 2, batch * max(critical, marginal), **table)
        self.count = torch.zeros(config.layers, 2, **table)
        self.mark = torch.zeros(*base[1:], capacity, dtype=torch.int8, device=device)
        self.levels = torch.zeros(*base[1:], LEVELS, **table)

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

    def slots_of(self, layer: int) -> tuple[Slots, Slots | None]:
        """The critical and the marginal slots of a layer."""
        marginal = self.marginal_slots
        return self.critical_slots.layer(layer), None if marginal is None else marginal.layer(layer)

    def fold(self, layer: int) -> None:
        """What the newest token attended to in this layer goes into the memory; the first time no slot holds a
        token."""
        row = self.logits[layer, :, 0], self.lse[layer, :, 0]
        add_held(self.memory[layer], *row, self.decay, self.slots_of(layer)[0])

    def place(self, layer: int, total: Tensor, sizes: Tensor, length: Tensor, memory: bool) -> None:
        """Choose the tiers of a layer by `total` (B, G, S) and give them slots (tiers.plan_tiers). memory: tokens that
        are not critical are remembered with their totals. Before that the tokens of the last step, whose rows the pools
        alone have, go into the offloaded tier."""
        store_rows(self.key[layer], self.value[layer], self.offloaded[layer], self.newest[layer], self.start)
        plan_tiers(
            total, length, sizes, self.shared, *self.slots_of(layer), self.memory[layer] if memory else None,
            self.newest[layer], self.rows[layer], self.count[layer], self.mark, self.levels, self.offloaded.shape[3],
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
        pools, (slots, marginal_slots) = (self.key[layer], self.value[layer]), self.slots_of(layer)
        query = rope_append(qkv, rope, *pools, span.positions, self.newest[layer])
        row = (None, None) if self.logits is None else (self.logits[layer], self.lse[layer])
        middle = (None, None) if self.marginal is None else (self.borrowed[layer], self.marginal[layer])
        return decode_attention(query, *pools, span.length, slots, *row, *middle, marginal_slots)[0]

    def free_from(self, end: Tensor) -> None:
        """Free the slots of tokens at or beyond a sequence's end (B,): drafts that were refused."""
        self.critical_slots.token.masked_fill_(self.critical_slots.token >= end[:, None], -1)

    def tokens(self, b: int) -> dict[str, float]:
        """Tokens of sequence b in each tier's slots, mean over layers and KV heads."""
        tables = {"critical": self.critical_slots, "marginal": self.marginal_slots}
        heads = self.config.layers * self.config.kv_heads
        return {
            tier: 0.0 if slots is None else (slots.token[:, b] >= 0).sum().item() / heads
            for tier, slots in tables.items()
        }

    def row_bytes(self, critical: int, marginal: int) -> int:
        """Bytes of rows brought from the offloaded tier: K and V of critical ones, V of marginal ones."""
        return (2 * critical + marginal) * self.config.head_dim * self.offloaded.itemsize
