"""The caches that keep every token: full, and full with scores. And what a line of a cache's ledger is.

Where it sits: the SLM keeps its cache in one with scores (tokens -> **SLM -> scores** -> tier plan), the full baseline
and every prefill in a plain one. The LLM's three tiers are cache.py's. A model knows of a cache only `attend`; a cache
is made for a number of positions known at the start and holds token j of sequence b at index j.

| cache         | keeps                                                                     | used by             |
| ------------- | ------------------------------------------------------------------------- | ------------------- |
| `FullCache`   | K and V of every token on the device                                      | full baseline       |
| `ScoredCache` | the same, and what attention says of every token: newest row and score    | the SLM             |

Both may hold K and V in 8 bits (int8_rows.py): the SLM's with `Settings.slm_kv`, and the rival of bench.py. A prompt is
then prefilled on exact ones beside them, from which its scales come.

Shapes follow the legend in model.py.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from int8_rows import Scales, decode, encode, per_token, prompt_rows
from kernels import NEGLIGIBLE, causal_attention, column_sums, full_attention_block
from model import Config, Span

FADES = 0.9  # the largest decay of a memory in 16 bits


@dataclass(frozen=True)
class Entry:
    """One line of a ledger: bytes of one kind on one device."""

    what: str
    device: str
    size: int


def table_bytes(dtype: torch.dtype, *shape: int) -> int:
    return dtype.itemsize * torch.Size(shape).numel()


def scale_entries(config: Config, batch: int, device: str, int8: bool) -> list[Entry]:
    """Of the scales (2, L, B, G, 2, D) fp32 of K and V in 8 bits, if they are."""
    size = table_bytes(torch.float32, 2, config.layers, batch, config.kv_heads, 2, config.head_dim)
    return [Entry("int8 scales", device, size)] * int8


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the logits that a model of this dtype keeps as scores."""
    return torch.float16 if dtype.itemsize == 2 else torch.float32


def memory_dtype(dtype: torch.dtype, decay: float, one_way: bool = False) -> torch.dtype:
    """Of the LLM's score memory (`--scores fused`), for a model of this dtype: 16 bits for 16, if what comes at a step
    is at least a tenth of what is there; else it could be lost beside eight binary digits. one_way: the scores of
    --no-saliency-shift, which no kernel reads, stay fp32."""
    return torch.bfloat16 if dtype.itemsize == 2 and decay <= FADES and not one_way else torch.float32


class FullCache:
    """K and V of every token, (L, B, G, S, D) each, on the model's device.

    int8: as levels, with scale (2, L, B, G, 2, D) fp32, of K and of V; else scale is None.
    """

    sliced = ("key", "value")  # tensors whose dimension 1 is the sequence

    def __init__(self, config: Config, batch: int, capacity: int, device, dtype: torch.dtype, int8: bool = False):
        shape = (config.layers, batch, config.kv_heads, capacity, config.head_dim)
        self.dtype, held = dtype, torch.int8 if int8 else dtype  # of the model
        self.key = torch.empty(shape, device=device, dtype=held)
        self.value = torch.zeros(shape, device=device, dtype=held)  # unseen columns weigh 0, and 0 * NaN is NaN
        self.scale = torch.ones(2, *shape[:3], 2, config.head_dim, device=device) if int8 else None

    def scales(self, layer: int) -> Scales:
        """K's and V's of one layer, (B, G, 2, D); None where they are exact."""
        return (None, None) if self.scale is None else (self.scale[0, layer], self.scale[1, layer])

    def sequence(self, b: int, count: int = 1) -> "FullCache":
        """The same memory seen as the cache of sequence b alone (B = 1), or of `count` from there on, for a prefill."""
        view = copy.copy(self)
        for name in self.sliced:
            setattr(view, name, getattr(self, name)[:, b : b + count])
        if self.scale is not None:
            view.scale = self.scale[:, :, b : b + count]
        return view

    def staging(self, b: int, length: int, count: int = 1) -> "FullCache":
        """Where the prompt of sequence b is prefilled, or `count` of that length from there on: here, in place, but for
        K and V that will be rounded."""
        view = self.sequence(b, count)
        if self.scale is not None:
            shape = (*view.key.shape[:3], length, view.key.shape[4])
            view.key, view.value = (torch.empty(shape, device=self.key.device, dtype=self.dtype) for _ in range(2))
            view.scale = None
        return view

    def load(self, b: int, staged: "FullCache", length: int) -> None:
        """Take over the prefilled prompt of one sequence: it was written in place, or is rounded now."""
        if self.scale is None:
            return
        for held, made, scale in zip((self.key, self.value), (staged.key, staged.value), self.scale):
            for part, rows in prompt_rows(made[:, 0], scale[:, b]):
                held[part, b, :, :length] = rows

    def migrate(self, plan: Callable, span: Span) -> None:
        """A full cache has one tier: nothing moves."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, span: Span) -> Tensor:
        """Append key, value (B, G, T, D), then attend with query (B, H, T, D). A prompt comes alone (B = 1)."""
        seen_key, seen_value = self._append(layer, key, value, span)
        if len(query) == 1 and query.shape[2] > 1:
            return causal_attention(query, seen_key, seen_value)
        return full_attention_block(query, seen_key, seen_value, span.positions)[0]

    def _append(self, layer: int, key: Tensor, value: Tensor, span: Span) -> list[Tensor]:
        """Returns K and V up to the span's end, (B, G, end, D), in the model's dtype."""
        if span.end > self.key.shape[3]:
            raise ValueError(f"position {span.end - 1} is beyond the cache's {self.key.shape[3]} positions")
        index = span.positions[:, None, :, None].expand_as(key)  # (B, G, T, D)
        seen = []
        for held, rows, scale in zip((self.key[layer], self.value[layer]), (key, value), self.scales(layer)):
            held.scatter_(2, index, encode(rows, per_token(scale)))
            seen.append(decode(held[:, :, : span.end], per_token(scale), self.dtype))
        return seen

    def ledger(self) -> list[Entry]:
        device, held = self.key.device.type, self.key.nbytes + self.value.nbytes
        scales = [] if self.scale is None else [Entry("int8 scales", device, self.scale.nbytes)]
        return [Entry("full K, V", device, held), *scales]

    @staticmethod
    def predict(
        config: Config, batch: int, capacity: int, device: str, dtype: torch.dtype, int8: bool = False
    ) -> list[Entry]:
        held = torch.int8 if int8 else dtype
        size = table_bytes(held, config.layers, batch, config.kv_heads, capacity, config.head_dim)
        return [Entry("full K, V", device, 2 * size), *scale_entries(config, batch, device, int8)]


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
        sums: Callable = column_sums, keep_row: bool = False, int8: bool = False,
    ):  # fmt: skip
        super().__init__(config, batch, capacity, device, dtype, int8)
        shape = (config.layers, batch, config.query_heads, capacity)
        self.decay, self.sums = decay, sums
        self.score = torch.zeros(shape, device=device)
        self.sliced = ("key", "value", "score") + ("row",) * keep_row
        if keep_row:
            self.row = torch.zeros(shape, device=device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, span: Span) -> Tensor:
        seen_key, seen_value = self._append(layer, key, value, span)
        T, end = query.shape[2], span.end
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
        shape, dtype = self.score.shape, logits_dtype(self.dtype)
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
        logits: bool = False, int8: bool = False,
    ) -> list[Entry]:  # fmt: skip
        """logits: as `hold_logits` leaves it."""
        held = logits_dtype(dtype) if logits else torch.float32
        scores = (1 + keep_row) * table_bytes(held, config.layers, batch, config.query_heads, capacity)
        return FullCache.predict(config, batch, capacity, device, dtype, int8) + [Entry("scores", device, scores)]
