"""The SLM's cache cut to a share of its tokens (`--slm-budget`, appendix A.3, Table 5): H2O's rule on the small model.

Where it sits: in place of `full_cache.ScoredCache` when `Settings.slm_budget` is below 1. Per layer and KV head there
are slots for that share of the tokens and no more; half of them hold the newest tokens, half those that gathered most
attention since they came (arXiv 2306.14048, as in baselines.py). What is dropped is gone: K, V and score.

What the LLM's plan sees: a dropped token has no score in the rows of that KV head's query heads, so it counts 0 there,
and a token that all matched heads have dropped ranks last; among these the earlier one ranks first. It borrows nothing
either. So saliency shift is compensated for what the SLM still holds, and Table 5 is what the rest costs.

The scores lie by slot, (L, B, H, N), and not by position: the memory is really freed. A static step lays them by
position all the same, see graph_frugal.py. Shapes follow model.py's legend; N is the number of slots.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from full_cache import Entry, ScoredCache
from kernels import column_sums, tiered_attention
from model import Config, Span


def kept_tokens(share: float, length: Tensor | int) -> Tensor | int:
    """Tokens that stay of `length`, the coming one among them: at least that one."""
    if isinstance(length, int):
        return max(1, int(share * length + 1e-9))
    return (share * length.double() + 1e-9).long().clamp(min=1)


def heavy_and_recent(position: Tensor, heavy: Tensor, length: Tensor | int, kept: Tensor | int) -> Tensor:
    """The rank (..., N) of each in `heavy_order`; 0 stays first."""
    return heavy_order(position, heavy, length, kept).argsort(-1)


def heavy_order(position: Tensor, heavy: Tensor, length: Tensor | int, kept: Tensor | int) -> Tensor:
    """Indices (..., N) of tokens or slots by H2O's rule, who stays first: the newest half of `kept`, then by attention
    gathered.

    position, heavy (..., N); position -1 is an empty slot and comes last. length and kept count the coming token.
    """
    recent = kept - kept // 2
    priority = heavy.masked_fill(position >= length - recent, torch.inf).masked_fill(position < 0, -torch.inf)
    return priority.argsort(dim=-1, descending=True, stable=True)


class Prompt(ScoredCache):
    """Where one prompt is prefilled, whole. gathered (L, 1, H, n) fp32: all attention a token got, at any decay."""

    def __init__(self, *shape, decay: float, sums: Callable):
        super().__init__(*shape, decay, sums)
        self.gathered = torch.zeros_like(self.score)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, span: Span) -> Tensor:
        out = super().attend(layer, query, key, value, span)
        self.gathered[layer, :, :, : span.end] += self.sums(query, self.key[layer, :, :, : span.end], 1.0)
        return out


class FrugalCache(ScoredCache):
    """K, V and scores of what the SLM keeps, in slots.

    position (L, B, G, N) int32: the token in each slot, -1 if none; a free slot has score 0. heavy (L, B, G, N) fp32:
    attention gathered since the token came, summed over the heads of the group. key, value (L, B, G, N, D), score and
    row (L, B, H, N) as in `ScoredCache`, by slot. Tokens are dropped in the steps that plan (`begin`), so there are
    `refresh` - 1 slots more for those that come between two plans.
    """

    def __init__(
        self, config: Config, batch: int, capacity: int, device, dtype: torch.dtype, decay: float,
        sums: Callable = column_sums, keep_row: bool = False, share: float = 1.0, refresh: int = 1,
    ):  # fmt: skip
        slots = kept_tokens(share, capacity) + refresh - 1
        super().__init__(config, batch, slots, device, dtype, decay, sums, keep_row)
        self.config, self.share, self.dropping, self.by_position = config, share, True, False
        shape = (config.layers, batch, config.kv_heads, slots)
        self.position = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.heavy = torch.zeros(shape, device=device)
        self.sliced += ("position", "heavy")

    # -- the prompt --

    def staging(self, b: int, length: int, count: int = 1) -> Prompt:
        """A cache for the whole prompt of one sequence, given up once `load` has picked from it."""
        return Prompt(self.config, 1, length, self.key.device, self.key.dtype, decay=self.decay, sums=self.sums)

    def load(self, b: int, staged: Prompt, length: int) -> None:
        """Take the tokens that leave a slot for the first one to come."""
        L, G, group = len(self.key), self.config.kv_heads, self.config.query_heads // self.config.kv_heads
        heavy = staged.gathered[:, 0].view(L, G, group, length).sum(2)  # (L, G, n)
        k = kept_tokens(self.share, length + 1) - 1
        token = torch.arange(length, device=heavy.device).expand(L, G, length)
        order = heavy_order(token, heavy, length + 1, k + 1)
        stays = order[:, :, :k].sort(-1).values  # (L, G, k), in order
        rows = stays[..., None].expand(-1, -1, -1, self.config.head_dim)
        self.key[:, b, :, :k] = staged.key[:, 0].gather(2, rows)
        self.value[:, b, :, :k] = staged.value[:, 0].gather(2, rows)
        self.position[:, b, :, :k], self.heavy[:, b, :, :k] = stays.int(), heavy.gather(2, stays)
        self.score[:, b, :, :k] = staged.score[:, 0].gather(2, stays.repeat_interleave(group, 1))

    # -- steps --

    def begin(self, plans: bool) -> None:
        self.dropping = plans

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, span: Span) -> Tensor:
        """Drop who does not stay, put key, value (B, G, 1, D) into the first free slot, attend with query."""
        if self.dropping:
            self._drop(layer, span.positions[:, :, None] + 1)
        position = self.position[layer]
        slot = (position < 0).byte().argmax(-1, keepdim=True)  # (B, G, 1)
        position.scatter_(2, slot, span.positions[:, None].int().expand_as(slot))
        for pool, row in ((self.key[layer], key), (self.value[layer], value)):
            pool.scatter_(2, slot[..., None].expand_as(row), row)
        own = torch.arange(position.shape[2], device=position.device).expand_as(position)
        out, row = tiered_attention(query, self.key[layer], self.value[layer], position >= 0, own,
                                    torch.zeros_like(self.score[layer]))  # fmt: skip
        self._remember(layer, row)
        return out

    def _drop(self, layer: int, length: Tensor) -> None:
        """Leave one slot for the token that makes a sequence `length` (B, 1, 1) long."""
        position, heavy = self.position[layer], self.heavy[layer]
        kept = kept_tokens(self.share, length)
        leaves = heavy_and_recent(position, heavy, length, kept) >= kept - 1  # (B, G, N), free slots among them
        position.masked_fill_(leaves, -1)
        heavy.masked_fill_(leaves, 0)
        group = self.config.query_heads // self.config.kv_heads
        self.score[layer].masked_fill_(leaves.repeat_interleave(group, 1), 0)

    def _remember(self, layer: int | slice, row: Tensor) -> None:
        """The newest query's attention by slot, (..., B, H, N)."""
        super()._remember(layer, row)
        self.heavy[layer] += row.unflatten(-2, (self.config.kv_heads, -1)).sum(-2)

    def of_heads(self, table: Tensor, head: Tensor, end: int) -> Tensor:
        """Rows of some heads by position, 0 for what is not held: table (L, B, H, ..., N) -> (B, h, ..., end)."""
        if self.by_position:
            return super().of_heads(table, head, end)
        held = super().of_heads(table, head, table.shape[-1])  # (B, h, ..., N)
        per_kv_head = self.position.repeat_interleave(self.config.query_heads // self.config.kv_heads, 2)
        position = super().of_heads(per_kv_head, head, table.shape[-1]).long()  # (B, h, N)
        column = position.where(position >= 0, end)  # empty slots go to a column that is cut off
        while column.dim() < held.dim():
            column = column.unsqueeze(-2)
        rows = held.new_zeros(*held.shape[:-1], end + 1)
        return rows.scatter_(-1, column.expand_as(held), held)[..., :end]

    # -- static steps --

    def lay_by_position(self, capacity: int) -> None:
        """score and row become (L, B, H, capacity), 0 for what is not held. For graph_frugal.py: `attend` is over."""
        group = self.config.query_heads // self.config.kv_heads
        for name in self.sliced[2:-2]:  # score, and row if there is one
            table = getattr(self, name)
            laid = table.new_zeros(*table.shape[:-1], capacity)
            for layer, position in enumerate(self.position):  # one at a time: the indices take twice the scores' bytes
                column = position.long().where(position >= 0, capacity)  # empty slots go to a column that is cut off
                column = column.repeat_interleave(group, 1)  # (B, H, N)
                laid[layer] = F.pad(laid[layer], (0, 1)).scatter_(-1, column, table[layer])[..., :capacity]
            setattr(self, name, laid)
        self.by_position = True

    # -- accounting --

    def tokens(self, b: int) -> float:
        """Tokens of sequence b that are held now, mean over layers and KV heads."""
        return (self.position[:, b] >= 0).sum(-1).float().mean().item()

    def ledger(self) -> list[Entry]:
        device = self.key.device.type
        scores = self.score.nbytes + self.heavy.nbytes + ("row" in self.sliced) * self.score.nbytes
        return [
            Entry("kept K, V", device, self.key.nbytes + self.value.nbytes),
            Entry("scores", device, scores),
            Entry("slot tables", device, self.position.nbytes),
        ]

    @staticmethod
    def predict(
        config: Config, batch: int, capacity: int, device: str, dtype: torch.dtype, keep_row: bool = False,
        share: float = 1.0, refresh: int = 1, by_position: bool = False,
    ) -> list[Entry]:  # fmt: skip
        """by_position: after `lay_by_position`."""
        slots = config.layers * batch * (kept_tokens(share, capacity) + refresh - 1)
        rows = (1 + keep_row) * config.query_heads * (config.layers * batch * capacity if by_position else slots)
        return [
            Entry("kept K, V", device, 2 * slots * config.kv_heads * config.head_dim * dtype.itemsize),
            Entry("scores", device, (rows + slots * config.kv_heads) * torch.float32.itemsize),
            Entry("slot tables", device, slots * config.kv_heads * torch.int32.itemsize),
        ]
