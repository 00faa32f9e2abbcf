"""Caches that evict: K and V of the tokens that stay, in slots; what leaves is gone.

Where it sits: beside cache.py, whose caches these are like. `SlotCache` is the baselines' (baselines.py), `CutCache`
the SLM's with `--slm-budget` (appendix A.3, Table 5).

Shapes follow the legend in model.py; N, the slots of a layer, may differ between layers here.
"""

import torch
from torch import Tensor

from cache import Cache, Prompt, Scores
from kernels import decode_attention
from model import Config, Span
from ops import Rope, Slots, rope_append


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
        first = torch.arange(position.shape[1], device=slot.device)[:, None] * position.shape[2]
        self.newest[layer].copy_(first + slot)  # counted over the KV heads of the sequence
        if self.heavy is not None:
            self.heavy[layer].masked_fill_(~stays, 0)

    def attend(self, layer: int, qkv: Tensor, rope: Rope, span: Span) -> Tensor:
        """Put the newest K and V into their slot, attend to the slots; (B, 1, H, D)."""
        key, value, position = self.key[layer].flatten(1, 2), self.value[layer].flatten(1, 2), self.position[layer]
        query = rope_append(qkv, rope, key, value, span.positions, self.newest[layer])
        B, G, N = position.shape
        logits = torch.empty(B, 1, query.shape[2] // G, G * N, device=query.device) if self.weighs else None
        slots = Slots.of(position)
        out, lse = decode_attention(query, key, value, span.length, slots, logits)
        if self.weighs:
            slot = slots.slot.long()[:, None].expand_as(logits[:, 0])  # (B, H/G, G N)
            by_slot = torch.empty_like(logits[:, 0]).scatter_(2, slot, logits[:, 0])
            by_slot = by_slot.unflatten(2, (G, N)).transpose(1, 2)  # (B, G, H/G, N)
            by_slot = by_slot.masked_fill(position[:, :, None] < 0, -torch.inf)
            self.weigh(layer, by_slot.flatten(1, 2), lse[:, 0])
        return out

    def weigh(self, layer: int, logits: Tensor, lse: Tensor) -> None:
        """The attention row by slot: logits (B, H, N), lse (B, H)."""
        weight = torch.exp2(logits - lse[..., None])
        self.heavy[layer] += weight.unflatten(1, (self.config.kv_heads, -1)).sum(2)

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
