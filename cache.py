"""The three tiers of SmallKV: critical, marginal, offloaded. And the ledger of what they hold where.

Where it sits: between the plan (smallkv.py) and the LLM (model.py), which knows of a cache only `attend`:
scores -> tier plan -> **migration** -> LLM (Section 4). Caches that keep every token are full_cache.py's.

Shapes follow the legend in model.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from full_cache import Entry, FullCache, ScoredCache, memory_dtype, scale_entries, table_bytes
from host_memory import host_rows, rows_on_host
from int8_rows import Scales, decode, encode, per_token, prompt_rows
from kernels import column_sums, tiered_attention
from kernels_move import store_rows_torch
from model import Config, Span


@dataclass(frozen=True)
class TierPlan:
    """Who goes where in one layer; masks over positions 0..n-1. What is in neither set is offloaded.

    critical, marginal: (B, G, n) bool, disjoint. borrowed: (B, H, n) fp32, the SLM's newest attention rows A'_f(i);
    None where there are no marginal tokens. gained: (B, G, n) fp32, what the LLM's own scores get beside its own
    weights (`--scores fused`); None: nothing.
    """

    critical: Tensor
    marginal: Tensor
    borrowed: Tensor | None
    gained: Tensor | None = None


def column(values: list[int], device) -> Tensor:
    """One number a sequence, to stand beside (B, G, n): (B, 1, 1)."""
    return torch.tensor(values, device=device)[:, None, None]


def assign_slots(position: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give every wanted token a slot; who is held and wanted stays, who is not wanted leaves, the rest fills the gaps.

    position (B, G, N) int64: the token in each slot, -1 if none. wanted (B, G, n) bool, at most N true in a row.
    Returns the new position (B, G, N), slot (B, G, n) of every wanted token (-1 elsewhere), and fresh (B, G, n) bool:
    the tokens whose rows must be brought in.
    """
    slots, tokens = position.shape[-1], wanted.shape[-1]
    keep = (position >= 0) & wanted.gather(-1, position.clamp(min=0))  # (B, G, N)
    # Scatters below send what must not be written to one extra column, which is then cut off.
    slot = torch.full((*wanted.shape[:2], tokens + 1), -1, device=wanted.device)
    slot = slot.scatter(-1, position.where(keep, tokens), torch.arange(slots, device=wanted.device).expand_as(position))
    slot = slot[..., :tokens]
    fresh = wanted & (slot < 0)
    free = keep.byte().argsort(dim=-1, stable=True)  # free slots first, in order
    nth = fresh.cumsum(-1) - 1  # the n-th fresh token takes the n-th free slot
    slot = free.gather(-1, nth.clamp(0, slots - 1)).where(fresh, slot)
    held = torch.cat((position.where(keep, -1), torch.full_like(position[..., :1], -1)), dim=-1)  # (B, G, N + 1)
    names = torch.arange(tokens, device=wanted.device).expand_as(slot)
    return held.scatter(-1, slot.where(fresh, slots), names)[..., :slots], slot, fresh


class TieredCache:
    """The LLM's cache in three tiers, chosen anew at every step for each sequence, layer and KV head.

    On the device there are two pools of slots, sized by the budget: the K pool (L, B, G, C, D) holds the keys of
    critical tokens, the V pool (L, B, G, N, D) the values of critical and marginal tokens. A token is critical if it is
    in both, marginal if it is in the V pool only, offloaded if it is in neither. The host holds K and V of every token
    side by side (L, B, G, S', 2, D), S' rows for S positions (host_memory.py), written once when the token is made; so
    leaving a pool copies nothing, a marginal token that turns critical brings its key alone, and what comes back is the
    same to the bit. int8: all of them, and what is newest, are levels (int8_rows.py), scale (2, L, B, G, 2, D) fp32 of
    K and of V.

    prefetch: the rows of layer l + 1 are sent while layer l computes (on CUDA: on a side stream); without it when layer
    l + 1 begins. own_decay: if given, the LLM's own scores are kept too (L, B, G, S): what its attention weights say of
    the tokens that it holds. one_way: and who has left the pools, for --no-saliency-shift.
    """

    def __init__(
        self, config: Config, batch: int, capacity: int, critical_slots: int, value_slots: int, device,
        dtype: torch.dtype, prefetch: bool = True, own_decay: float | None = None, one_way: bool = False,
        sums: Callable = column_sums, int8: bool = False,
    ):  # fmt: skip
        device = torch.device(device)
        self.config, self.capacity, self.prefetch, self.sums = config, capacity, prefetch, sums
        self.own_decay, self.one_way = own_decay, one_way
        base = (config.layers, batch, config.kv_heads)
        self.dtype, held = dtype, torch.int8 if int8 else dtype  # of the model, and of its K and V
        self.key = torch.empty(*base, critical_slots, config.head_dim, device=device, dtype=held)
        self.value = torch.empty(*base, value_slots, config.head_dim, device=device, dtype=held)
        self.key_position = torch.full((*base, critical_slots), -1, dtype=torch.int32, device=device)
        self.value_position = torch.full((*base, value_slots), -1, dtype=torch.int32, device=device)
        self.value_slot = torch.zeros(*base, critical_slots, dtype=torch.int32, device=device)  # K slot -> V slot
        self.host = rows_on_host((*base, host_rows(capacity), 2, config.head_dim), held, device)
        self.scale = torch.ones(2, *base, 2, config.head_dim, device=device) if int8 else None
        self.newest = torch.empty(2, *base, config.head_dim, device=device, dtype=held)  # this step's K and V
        self.newest_position: Tensor | None = None  # (B,), once a step has run
        if own_decay is not None:
            self.score = torch.zeros(*base, capacity, device=device, dtype=memory_dtype(dtype, own_decay, one_way))
        if one_way:
            self.dropped = torch.zeros(*base, capacity, dtype=torch.bool, device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: tuple[FullCache, torch.cuda.Event] | None = None  # a prompt on its way to the host
        self.keys_moved = self.values_moved = self.steps = self.filled = 0  # filled: rows that the first plan brought
        self._plan: Callable[[int], TierPlan] | None = None
        self._ready: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}  # layer -> borrowed weights, arrival

    @property
    def host_key(self) -> Tensor:
        """(L, B, G, S', D)."""
        return self.host[..., 0, :]

    @property
    def host_value(self) -> Tensor:
        """(L, B, G, S', D)."""
        return self.host[..., 1, :]

    def scales(self, at) -> Scales:
        """K's and V's at this index of (L, B, G, 2, D); None where rows are exact."""
        return (None, None) if self.scale is None else (self.scale[0][at], self.scale[1][at])

    def staging(self, b: int, length: int) -> FullCache:
        """A full cache of one sequence for its prefill, given up once `load` has taken it over."""
        shape = (self.config, 1, length, self.key.device, self.dtype)
        if self.own_decay is None:
            return FullCache(*shape)
        staged = ScoredCache(*shape, self.own_decay, self.sums)
        staged.prompt = length
        return staged

    def load(self, b: int, staged: FullCache, length: int) -> None:
        """Write the K and V of a prefilled prompt to the host; the first plan brings back what it wants.

        On CUDA on a side stream, beside the next prompt's prefill. `staged` is held until the next one is loaded, or
        until `finish_loading`: two of them at most are alive, and no memory is reused while it is still being read.
        """
        if self.own_decay is not None:
            L, G = self.score.shape[0], self.score.shape[2]
            self.score[:, b, :, :length] = staged.score[:, 0].view(L, G, -1, length).sum(2)
        if self.stream is None:
            self._to_host(b, staged, length)
            return
        compute = torch.cuda.current_stream(self.key.device)
        if self._copied is not None:  # who takes that memory next does so after the copies
            compute.wait_event(self._copied[1])
        self.stream.wait_stream(compute)
        with torch.cuda.stream(self.stream):
            self._to_host(b, staged, length)
            self._copied = staged, self.stream.record_event()

    def _to_host(self, b: int, staged: FullCache, length: int) -> None:
        made = zip((staged.key, staged.value), self.scales((slice(None), b)))
        for (part, key), (_, value) in zip(*(prompt_rows(rows[:, 0], scale) for rows, scale in made)):
            both = torch.stack((key, value), 3)  # (L', G, n, 2, D)
            for targets, sources in zip(self.host[part, b, :, :length], both):
                for target, source in zip(targets, sources):  # a KV head is contiguous: a straight copy, nobody waits
                    target.copy_(source, non_blocking=True)
            del key, value, both  # before the next piece is made

    def finish_loading(self) -> None:
        """The prefill is over: wait until its prompts are on the host, which is read from now on."""
        if self._copied is not None:
            self._copied[1].synchronize()
            self._copied = None

    # -- movement --

    def migrate(self, plan: Callable[[int], TierPlan], span: Span) -> None:
        """Begin the step of the tokens at `span`: `plan(layer)` says who goes where, itself included.

        The rows are in their slots by the time `attend` needs them.
        """
        self.finish_loading()
        self._store_newest()
        self._plan, self._position = plan, span.positions[:, 0]  # (B,)
        if self.steps == 1:
            self.filled = self.keys_moved + self.values_moved
        self.steps += 1
        if self.prefetch:
            if self.stream is not None:
                # The scores are made on the current stream, and the last step read the slots there.
                self.stream.wait_stream(torch.cuda.current_stream(self.key.device))
            self._prefetch(0)

    def _store_newest(self) -> None:
        """The last step's token goes to the host; it was a recent token since, so nobody has asked for it yet."""
        if self.newest_position is not None:
            newest = self.newest[:, :, :, None]  # (2, L, B, 1, G, D)
            store_rows_torch(newest, self.host, self.newest_position + 1)

    def _prefetch(self, layer: int) -> None:
        if layer == self.config.layers:
            return
        if self.stream is None:
            self._ready[layer] = (self._move(layer), None)
            return
        compute = torch.cuda.current_stream(self.key.device)
        with torch.cuda.stream(self.stream):
            borrowed = self._move(layer)
            borrowed.record_stream(compute)  # made on one stream, used on the other: keep its memory until then
            self._ready[layer] = (borrowed, self.stream.record_event())

    def _move(self, layer: int) -> Tensor:
        """Carry out one layer's plan; returns the borrowed weights by V slot (B, H, N), 0 on critical tokens."""
        plan = self._plan(layer)
        if layer + 1 == self.config.layers:
            self._plan = None  # a policy that holds a cache that holds the policy is given back late
        G = self.config.kv_heads
        keys, key_slot, fresh_keys = assign_slots(self.key_position[layer].long(), plan.critical)
        held = plan.critical | plan.marginal
        values, value_slot, fresh_values = assign_slots(self.value_position[layer].long(), held)
        self.key_position[layer], self.value_position[layer] = keys, values
        self.value_slot[layer] = value_slot.gather(-1, keys.clamp(min=0)).clamp(min=0)
        self.keys_moved += self._bring(self.key[layer], key_slot, self.host_key[layer], fresh_keys)
        self.values_moved += self._bring(self.value[layer], value_slot, self.host_value[layer], fresh_values)
        if self.own_decay is not None:
            score = self.score[layer].mul_(self.own_decay)
            if plan.gained is not None:
                score[:, :, : held.shape[-1]] += plan.gained
        if self.one_way:
            made = torch.arange(held.shape[-1], device=held.device) <= self._position[:, None, None]
            self.dropped[layer, :, :, : held.shape[-1]] |= made & ~held  # a token that is not made yet is not dropped
        index, marginal = values.clamp(min=0), plan.marginal
        if plan.borrowed is None:
            B, H, N = values.shape[0], self.config.query_heads, values.shape[-1]
            return torch.zeros(B, H, N, device=values.device)
        in_tier = marginal.gather(-1, index) & (values >= 0)  # (B, G, N)
        share = plan.borrowed.shape[1] // G
        weight = plan.borrowed.gather(-1, index.repeat_interleave(share, 1))  # (B, H, N)
        return weight * in_tier.repeat_interleave(share, 1)

    def _bring(self, pool: Tensor, slot: Tensor, host: Tensor, fresh: Tensor) -> int:
        """Move the fresh tokens' rows from host (B, G, S', D) into pool (B, G, slots, D); returns how many.

        The newest tokens of each sequence have slots but no rows yet: attention writes them.
        """
        moving = fresh & (torch.arange(fresh.shape[-1], device=fresh.device) < self._position[:, None, None])
        b, g, token = moving.nonzero(as_tuple=True)
        head = b * self.config.kv_heads + g
        target, source = head * pool.shape[2] + slot[b, g, token], head * host.shape[2] + token
        pool.view(-1, pool.shape[-1])[target] = host.flatten(0, 2)[source]  # Algorithm 1, line 9
        return len(token)

    # -- attention --

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, span: Span) -> Tensor:
        """Put the newest token's key, value (B, G, 1, D) into its slots, then attend with query (B, H, 1, D), Eq. 6."""
        if query.shape[2] != 1:
            raise ValueError(f"a tiered cache takes one token a step, not {query.shape[2]}; prefill is for staging()")
        borrowed = self._arrived(layer)
        key, value = self._put(layer, key, value, span)
        self.newest[0, layer], self.newest[1, layer] = key[:, :, 0], value[:, :, 0]
        self.newest_position = self._position
        used = self.key_position[layer] >= 0
        out, weight = tiered_attention(query, *self._pools(layer), used, self.value_slot[layer].long(), borrowed)
        if self.own_decay is not None:
            self._remember(layer, weight)
        if self.prefetch:
            self._prefetch(layer + 1)
        return out

    def _arrived(self, layer: int) -> Tensor:
        """Wait for the rows of a layer; its borrowed weights."""
        if not self.prefetch:
            self._ready[layer] = (self._move(layer), None)
        borrowed, arrived = self._ready.pop(layer)
        if arrived is not None:
            torch.cuda.current_stream(self.key.device).wait_event(arrived)
        return borrowed

    def _pools(self, layer: int) -> list[Tensor]:
        """K and V of one layer in the model's dtype."""
        both = zip((self.key[layer], self.value[layer]), self.scales(layer))
        return [decode(pool, per_token(scale), self.dtype) for pool, scale in both]

    def _put(self, layer: int, key: Tensor, value: Tensor, span: Span) -> list[Tensor]:
        """Write key, value (B, G, T, D) of the new tokens into the slots that the plan has given them; returns both as
        they are held."""
        position = span.positions[:, None, :, None]  # (B, 1, T, 1)
        key, value = (encode(row, per_token(scale)) for row, scale in zip((key, value), self.scales(layer)))
        for pool, where, row in ((self.key, self.key_position, key), (self.value, self.value_position, value)):
            slot = (where[layer][:, :, None] == position).byte().argmax(-1, keepdim=True)  # (B, G, T, 1)
            pool[layer].scatter_(2, slot.expand_as(row), row)
        return [key, value]

    def _remember(self, layer: int, weight: Tensor) -> None:
        """Add this step's weights (B, H, N), summed over a group's heads, to the LLM's own scores, which have faded."""
        B, G, N = self.value_position[layer].shape
        index = self.value_position[layer].long().clamp(min=0)
        score = self.score[layer]
        score.scatter_add_(-1, index, weight.view(B, G, -1, N).sum(2).to(score.dtype))

    # -- accounting --

    def tokens(self, b: int) -> tuple[float, float]:
        """Critical and marginal tokens of sequence b that are in the slots now, mean over layers and KV heads."""
        pools = self.key_position[:, b], self.value_position[:, b]
        critical, held = ((position >= 0).sum(-1).float().mean().item() for position in pools)
        return critical, held - critical

    def moved_bytes(self) -> float:
        """Bytes from the host a step and sequence, mean; the first plan, which fills the pools, does not count."""
        rows = (self.keys_moved + self.values_moved - self.filled) / max(1, self.steps - 1)
        return rows * self.config.head_dim * self.host.itemsize / self.key.shape[1]

    def ledger(self) -> list[Entry]:
        """What is allocated, by tier and device."""
        device = self.key.device.type
        tables = self.key_position.nbytes + self.value_position.nbytes + self.value_slot.nbytes + self.newest.nbytes
        entries = [
            Entry("critical K, V", device, 2 * self.key.nbytes),
            Entry("marginal V", device, self.value.nbytes - self.key.nbytes),
            Entry("slot tables, newest K, V", device, tables),
            Entry("host K, V", "host", self.host.nbytes),
        ]
        if self.scale is not None:
            entries.append(Entry("int8 scales", device, self.scale.nbytes))
        if self.own_decay is not None:
            entries.append(Entry("scores", device, self.score.nbytes + self.one_way * self.score.numel()))
        return entries

    @staticmethod
    def predict(
        config: Config, batch: int, capacity: int, critical_slots: int, value_slots: int, device: str,
        dtype: torch.dtype, own_decay: float | None = None, one_way: bool = False, int8: bool = False,
    ) -> list[Entry]:  # fmt: skip
        """The ledger from the shapes alone, before anything is allocated."""
        rows, D = config.layers * batch * config.kv_heads, config.head_dim
        held = torch.int8 if int8 else dtype
        entries = [
            Entry("critical K, V", device, 2 * table_bytes(held, rows, critical_slots, D)),
            Entry("marginal V", device, table_bytes(held, rows, value_slots - critical_slots, D)),
            Entry(
                "slot tables, newest K, V",
                device,
                table_bytes(torch.int32, rows, 2 * critical_slots + value_slots) + table_bytes(held, 2, rows, D),
            ),
            Entry("host K, V", "host", 2 * table_bytes(held, rows, host_rows(capacity), D)),
        ]
        entries += scale_entries(config, batch, device, int8)
        if own_decay is not None:
            size = table_bytes(memory_dtype(dtype, own_decay, one_way), rows, capacity)
            entries.append(Entry("scores", device, size + one_way * rows * capacity))
        return entries
