"""The caches that keep every token: full, and full with scores. And what a line of a cache's ledger is.

Where it sits: the SLM keeps its cache in one with scores (tokens -> **SLM -> scores** -> tier plan), the full baseline
and every prefill in a plain one. The LLM's three tiers are cache.py's. A model knows of a cache only `attend`; a cache
is made for a number of positions known at the start and holds token j of sequence b at index j.

| cache         | keeps                                                                     | used by             |
| ------------- | ------------------------------------------------------------------------- | ------------------- |
| `FullCache`   | K and V of every token on the device                                      | full baseline       |
| `ScoredCache` | the same, and what attention says of every token: newest row and score    | the SLM             |

Shapes follow the legend in model.py.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import NEGLIGIBLE, causal_attention, column_sums, full_attention_block
from model import Config, Span


@dataclass(frozen=True)
class Entry:
    """One line of a ledger: bytes of one kind on one device."""

    what: str
    device: str
    size: int


def table_bytes(dtype: torch.dtype, *shape: int) -> int:
    return dtype.itemsize * torch.Size(shape).numel()


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the logits that a model of this dtype keeps as scores."""
    return torch.float16 if dtype.itemsize == 2 else torch.float32


class FullCache:
    """K and V of every token, (L, B, G, S, D) each, on the model's device."""

    sliced = ("key", "value")  # tensors whose dimension 1 is the sequence

    def __init__(self, config: Config, batch: int, capacity: int, device, dtype: torch.dtype):
        shape = (config.layers, batch, config.kv_heads, capacity, config.head_dim)
        self.key = torch.empty(shape, device=device, dtype=dtype)
        self.value = torch.zeros(shape, device=device, dtype=dtype)  # unseen columns weigh 0, and 0 * NaN is NaN

    def sequence(self, b: int, count: int = 1) -> "FullCache":
        """The same memory seen as the cache of sequence b alone (B = 1), or of `count` from there on, for a prefill."""
        view = copy.copy(self)
        for name in self.sliced:
            setattr(view, name, getattr(self, name)[:, b : b + count])
        return view

    def staging(self, b: int, length: int, count: int = 1) -> "FullCache":
        """Where the prompt of sequence b is prefilled, or `count` of that length from there on: here, in place."""
        return self.sequence(b, count)

    def load(self, b: int, staged: "FullCache", length: int) -> None:
        """Take over a prefilled prompt: nothing to do, it was written in place."""

    def migrate(self, plan: Callable, span: Span) -> None:
        """A full cache has one tier: nothing moves."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, span: Span) -> Tensor:
        """Append key, value (B, G, T, D), then attend with query (B, H, T, D). A prompt comes alone (B = 1)."""
        self._append(layer, key, value, span)
        seen_key, seen_value = self.key[layer, :, :, : span.end], self.value[layer, :, :, : span.end]  # (B, G, end, D)
        if len(query) == 1 and query.shape[2] > 1:
            return causal_attention(query, seen_key, seen_value)
        return full_attention_block(query, seen_key, seen_value, span.positions)[0]

    def _append(self, layer: int, key: Tensor, value: Tensor, span: Span) -> None:
        if span.end > self.key.shape[3]:
            raise ValueError(f"position {span.end - 1} is beyond the cache's {self.key.shape[3]} positions")
        index = span.positions[:, None, :, None].expand_as(key)  # (B, G, T, D)
        self.key[layer].scatter_(2, index, key)
        self.value[layer].scatter_(2, index, value)

    def ledger(self) -> list[Entry]:
        return [Entry("full K, V", self.key.device.type, self.key.nbytes + self.value.nbytes)]

    @staticmethod
    def predict(config: Config, batch: int, capacity: int, device: str, dtype: torch.dtype) -> list[Entry]:
        size = table_bytes(dtype, config.layers, batch, config.kv_heads, capacity, config.head_dim)
        return [Entry("full K, V", device, 2 * size)]


class ScoredCache(FullCache):
    """A full cache that also remembers what attention says of every token; the SLM's.

    score (L, B, H, S) fp32: the score memory, score = decay * score + newest row; decay 1 is Eq. 1's accumulation (a
    static step may keep logits there, see `hold_logits`). row (L, B, H, S) fp32, with keep_row: the newest query's
    attention, which marginal tokens borrow. sums: what makes the scores of a prefill, `kernels.column_sums` or its
    Triton version.
    """

    prompt: int | None = None  # tokens of the prompt that is being prefilled, where that is known

    def __init__(
        self, config: Config, batch: int, capacity: int, device, dtype: torch.dtype, decay: float,
        sums: Callable = column_sums, keep_row: bool = False,
    ):  # fmt: skip
        super().__init__(config, batch, capacity, device, dtype)
        shape = (config.layers, batch, config.query_heads, capacity)
        self.decay, self.sums = decay, sums
        self.score = torch.zeros(shape, device=device)
        self.sliced = ("key", "value", "score") + ("row",) * keep_row
        if keep_row:
            self.row = torch.zeros(shape, device=device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, span: Span) -> Tensor:
        self._append(layer, key, value, span)
        T, end = query.shape[2], span.end
        seen_key, seen_value = self.key[layer, :, :, :end], self.value[layer, :, :, :end]
        if T > 1:
            coming = 0 if self.prompt is None else self.prompt - end
            if self.decay**coming >= NEGLIGIBLE:  # or nothing of this chunk is left at the prompt's end
                self.score[layer, :, :, :end].mul_(self.decay**T).add_(self.sums(query, seen_key, self.decay))
            return causal_attention(query, seen_key, seen_value)
        out, rows = full_attention_block(query, seen_key, seen_value, span.positions)
        self._remember(layer, rows[:, :, 0])
        return out

    def staging(self, b: int, length: int, count: int = 1) -> "ScoredCache":
        view = super().staging(b, length, count)
        view.prompt = length
        return view

    def _remember(self, layer: int | slice, row: Tensor) -> None:
        """The newest query's attention (..., B, H, end), of one layer or of all."""
        if "row" in self.sliced:
            self.row[layer][..., : row.shape[-1]] = row
        self.score[layer][..., : row.shape[-1]].mul_(self.decay).add_(row)

    def hold_logits(self) -> None:
        """From here on a static step keeps logits in the score, for models of 16 bits in as many; what was there is
        forgotten."""
        shape, dtype = self.score.shape, logits_dtype(self.key.dtype)
        self.score = None  # given back before its successor is made
        self.score = torch.zeros(shape, device=self.key.device, dtype=dtype)

    def begin(self, plans: bool) -> None:
        """A step begins: a cache that drops tokens does so in the steps that plan (frugal.py)."""

    def of_heads(self, table: Tensor, head: Tensor, end: int) -> Tensor:
        """Rows of some heads by position: table (L, B, H, ..., S), head (B, h) as l * H + h -> (B, h, ..., end)."""
        sequence = torch.arange(len(head), device=head.device)[:, None]
        return table[head // table.shape[2], sequence, head % table.shape[2], ..., :end]

    def ledger(self) -> list[Entry]:
        size = sum(getattr(self, name).nbytes for name in self.sliced[2:])
        return super().ledger() + [Entry("scores", self.score.device.type, size)]

    @staticmethod
    def predict(
        config: Config, batch: int, capacity: int, device: str, dtype: torch.dtype, keep_row: bool = False,
        logits: bool = False,
    ) -> list[Entry]:  # fmt: skip
        """logits: as `hold_logits` leaves it."""
        held = logits_dtype(dtype) if logits else torch.float32
        scores = (1 + keep_row) * table_bytes(held, config.layers, batch, config.query_heads, capacity)
        return FullCache.predict(config, batch, capacity, device, dtype) + [Entry("scores", device, scores)]
