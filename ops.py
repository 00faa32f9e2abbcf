"""The small work between a layer's matrix products: norm, RoPE with the cache's append, gate; and rows that move.

Where it sits: inside model.py, for both models, in a prefill and in every decode step; and scores -> tier plan ->
**migration** -> LLM (Algorithm 1, line 9): `store_rows` takes the newest rows into the offloaded tier, `bring_rows`
rows out of it into slots. Each function stands here twice with one signature, `NAME_torch` (the plain PyTorch truth)
and `NAME_triton` (one kernel), and once without a suffix: that one chooses. All other kernels of the project choose in
the same way, by `use_triton`.

Shapes follow the legend in model.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

FORCE: bool | None = None  # tests set it: True runs Triton kernels on a CPU, in the interpreter; False none anywhere
GATE_BLOCK = 1024  # numbers of one program
BRING_BYTES = 1 << 17  # that a program of the mover has under way: a thousand rows fill PCIe
MOVERS = 3  # programs of the mover, each with a multiprocessor that the LLM's products do without meanwhile
LARGE = 1 << 26  # bytes of a pool beyond which its moves outlast a layer, and one program more is worth it


def use_triton(x: Tensor) -> bool:
    """Whether the Triton version works on x: on a GPU, where no gradient is asked for."""
    if FORCE is not None:
        return FORCE
    return x.is_cuda and not (torch.is_grad_enabled() and x.requires_grad)


class Rope(NamedTuple):
    """What turns the heads of one layer: cos, sin (B, T, D/2) fp32 at the tokens' positions, and for models that norm
    their heads before (Qwen3) the weights (D,) of query and key norm and their epsilon, else None."""

    cos: Tensor
    sin: Tensor
    norms: tuple[Tensor, Tensor, float] | None


class Slots(NamedTuple):
    """Which tokens of one layer lie in which slots of a pool: of each sequence a list of places, KV head after KV head.

    slot, token (B, N) int32: each place has a slot of the pool, which all heads of the sequence share, and the token in
    it, -1 if none. begin (B, G + 2) int32: KV head g has the places from begin[g] to begin[g + 1]; from begin[G] to
    begin[G + 1] = N they are free.
    """

    slot: Tensor
    token: Tensor
    begin: Tensor

    @classmethod
    def free(cls, layers: int, batch: int, kv_heads: int, count: int, device) -> "Slots":
        """Of pools of `count` slots without a token: tables (L, B, ...)."""
        slot = torch.arange(count, dtype=torch.int32, device=device).repeat(layers, batch, 1)
        begin = torch.zeros(layers, batch, kv_heads + 2, dtype=torch.int32, device=device)
        begin[..., -1] = count
        return cls(slot, torch.full_like(slot, -1), begin)

    @classmethod
    def of(cls, position: Tensor) -> "Slots":
        """Of a pool in which every KV head has N slots of its own: position (B, G, N) int32, the token in each, -1 if
        none."""
        G = position.shape[1]
        head = torch.arange(G, device=position.device)[:, None].expand_as(position)
        return cls.sorted(head.where(position >= 0, G).flatten(1), position.flatten(1), G)

    @classmethod
    def sorted(cls, owner: Tensor, token: Tensor, kv_heads: int) -> "Slots":
        """Of slots in any order: owner (B, N), the KV head of each, kv_heads where it is free; token (B, N)."""
        slot = owner.argsort(dim=1, stable=True)
        begin = (owner[:, None] < torch.arange(kv_heads + 2, device=owner.device)[:, None]).sum(-1)
        return cls(slot.int(), token.gather(1, slot).int(), begin.int())

    def layer(self, layer: int) -> "Slots":
        """Of tables (L, B, ...) one layer's."""
        return Slots(*(table[layer] for table in self))

    def heads(self) -> Tensor:
        """The KV head of each place, G where it is free: (B, N) int64."""
        place = torch.arange(self.token.shape[1], device=self.token.device)
        return (place >= self.begin[:, 1:-1, None]).sum(1)

    def cells(self, tokens: int) -> Tensor:
        """Where each place's token stands in a table (B, G * tokens) by KV head and token, (B, N) int64; without a
        token one beyond its end."""
        beyond = (self.begin.shape[1] - 2) * tokens
        return (self.heads() * tokens + self.token).where(self.token >= 0, beyond)


# ---- RMSNorm ---------------------------------------------------------------------------------------------------------


def add_norm_torch(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + update (if there is one) and its RMSNorm, both (B, T, hidden).

    The mean of squares is taken in fp32: it overflows fp16 and loses half its digits in bf16. The weight comes after
    the rounding to x's dtype, as in Transformers.
    """
    if update is not None:
        x = x + update
    return x, weight * F.rms_norm(x, weight.shape, eps=eps)


@triton.jit
def _norm_kernel(x_ptr, update_ptr, weight_ptr, out_ptr, size, eps, BLOCK: tl.constexpr):
    """One token."""
    at = tl.arange(0, BLOCK)
    cell, inside = tl.program_id(0).to(tl.int64) * size + at, at < size
    x = tl.load(x_ptr + cell, mask=inside, other=0.0)
    if update_ptr is not None:
        x = (x.to(tl.float32) + tl.load(update_ptr + cell, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(x_ptr + cell, x, mask=inside)
    wide = x.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + cell, (weight * wide.to(x.dtype).to(tl.float32)).to(x.dtype), mask=inside)


def add_norm_triton(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum takes x's place in memory."""
    assert x.is_contiguous() and (update is None or update.is_contiguous())
    out, size = torch.empty_like(x), x.shape[-1]
    _norm_kernel[(x.numel() // size,)](
        x, update, weight, out, size, eps, BLOCK=triton.next_power_of_2(size), num_warps=8 if size > 2048 else 4
    )
    return x, out


def add_norm(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (add_norm_triton if use_triton(x) else add_norm_torch)(x, update, weight, eps)


# ---- RoPE and append -------------------------------------------------------------------------------------------------


def rotate(qkv: Tensor, rope: Rope, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, T, (H + 2G) D) -> query (B, T, H, D), key and value (B, T, G, D); query and key normed and turned.

    Dimension i is paired with i + D/2, as in the checkpoints. The turn is done in fp32.
    """
    heads = qkv.unflatten(-1, (-1, head_dim))  # (B, T, H + 2G, D)
    query, key, value = heads.split((heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads), 2)
    if rope.norms is not None:
        query, key = (add_norm_torch(x, None, rope.norms[i], rope.norms[2])[1] for i, x in enumerate((query, key)))
    cos, sin = (torch.cat((table, table), -1)[:, :, None] for table in (rope.cos, rope.sin))  # (B, T, 1, D)

    def turn(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, -1)
        return (x.float() * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)

    return turn(query), turn(key), value


def rope_append_torch(
    qkv: Tensor, rope: Rope, key: Tensor, value: Tensor, position: Tensor, slot: Tensor | None = None
) -> Tensor:
    """Turn the heads of T new tokens and put their K and V where they belong; returns the query (B, T, H, D).

    qkv (B, T, (H + 2G) D), position (B, T) int32. key, value: (B, G, S, D), written at the position; or with slot (B,
    G, T) int32 a pool (B, N, D) that the KV heads share, written there.
    """
    G = key.shape[1] if slot is None else slot.shape[1]
    query, fresh, rows = rotate(qkv, rope, G, key.shape[-1])
    fresh, rows = fresh.transpose(1, 2), rows.transpose(1, 2)  # (B, G, T, D)
    where = position[:, None].expand(fresh.shape[:3]) if slot is None else slot
    for pool, row in ((key, fresh), (value, rows)):
        if slot is None:
            pool.scatter_(2, where.long()[..., None].expand_as(row), row)
        else:
            pool.scatter_(1, where.flatten(1).long()[..., None].expand(-1, -1, row.shape[3]), row.flatten(1, 2))
    return query


@triton.jit
def _rope_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, eps, q_ptr, key_ptr, value_ptr, position_ptr, slot_ptr, slots,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """One head of one token; query, key or value by its number."""
    row, head = tl.program_id(0), tl.program_id(1)
    b, t = row // T, row % T
    dim = tl.arange(0, D // 2)
    source = qkv_ptr + (row.to(tl.int64) * (H + 2 * G) + head) * D
    first, second = tl.load(source + dim), tl.load(source + D // 2 + dim)
    dtype = first.dtype
    if head < H + G:
        one, two = first.to(tl.float32), second.to(tl.float32)
        if q_norm_ptr is not None:
            scale = tl.rsqrt((tl.sum(one * one, 0) + tl.sum(two * two, 0)) / D + eps)
            weight_ptr = tl.where(head < H, q_norm_ptr, k_norm_ptr)
            left, right = tl.load(weight_ptr + dim).to(tl.float32), tl.load(weight_ptr + D // 2 + dim).to(tl.float32)
            one = ((one * scale).to(dtype).to(tl.float32) * left).to(dtype).to(tl.float32)
            two = ((two * scale).to(dtype).to(tl.float32) * right).to(dtype).to(tl.float32)
        cos, sin = tl.load(cos_ptr + row * (D // 2) + dim), tl.load(sin_ptr + row * (D // 2) + dim)
        first, second = (one * cos - two * sin).to(dtype), (two * cos + one * sin).to(dtype)
    if head < H:
        query = q_ptr + (row.to(tl.int64) * H + head) * D
        tl.store(query + dim, first)
        tl.store(query + D // 2 + dim, second)
    else:
        kind, pair = (head - H) // G, b.to(tl.int64) * G + (head - H) % G  # kind 0: key, 1: value
        pool = tl.where(kind == 0, key_ptr, value_ptr)
        if slot_ptr is None:
            cell = pair * slots + tl.load(position_ptr + row)
        else:
            cell = b.to(tl.int64) * slots + tl.load(slot_ptr + pair * T + t)
        target = pool + cell * D
        tl.store(target + dim, first)
        tl.store(target + D // 2 + dim, second)


def rope_append_triton(
    qkv: Tensor, rope: Rope, key: Tensor, value: Tensor, position: Tensor, slot: Tensor | None = None
) -> Tensor:
    slots, D = key.shape[-2:]
    G, (B, T) = key.shape[1] if slot is None else slot.shape[1], qkv.shape[:2]
    H = qkv.shape[2] // D - 2 * G
    tables = qkv, rope.cos, rope.sin, key, value, position, slot
    assert all(table.is_contiguous() for table in tables if table is not None)
    query = torch.empty(B, T, H, D, device=qkv.device, dtype=qkv.dtype)
    norms = rope.norms or (None, None, 0.0)
    _rope_kernel[(B * T, H + 2 * G)](
        qkv, rope.cos, rope.sin, *norms, query, key, value, position, slot, slots, H=H, G=G, D=D, T=T, num_warps=1
    )  # fmt: skip
    return query


def rope_append(
    qkv: Tensor, rope: Rope, key: Tensor, value: Tensor, position: Tensor, slot: Tensor | None = None
) -> Tensor:
    return (rope_append_triton if use_triton(qkv) else rope_append_torch)(qkv, rope, key, value, position, slot)


# ---- The MLP's gate --------------------------------------------------------------------------------------------------


def gate_torch(both: Tensor) -> Tensor:
    """silu(gate) * up, both in one tensor: (..., 2 inner) -> (..., inner)."""
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


@triton.jit
def _gate_kernel(both_ptr, out_ptr, inner, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    gate = tl.load(both_ptr + row * 2 * inner + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + row * 2 * inner + inner + at, mask=inside, other=0.0)
    tl.store(out_ptr + row * inner + at, (gate / (1 + tl.exp(-gate))).to(up.dtype) * up, mask=inside)


def gate_triton(both: Tensor) -> Tensor:
    assert both.is_contiguous()
    *rows, inner = both.shape[:-1] + (both.shape[-1] // 2,)
    out = torch.empty(*rows, inner, device=both.device, dtype=both.dtype)
    grid = (out.numel() // inner, triton.cdiv(inner, GATE_BLOCK))
    _gate_kernel[grid](both, out, inner, BLOCK=GATE_BLOCK, num_warps=4)
    return out


def gate(both: Tensor) -> Tensor:
    return (gate_triton if use_triton(both) else gate_torch)(both)


# ---- Movement --------------------------------------------------------------------------------------------------------


def bring_rows_torch(key: Tensor | None, value: Tensor, offloaded: Tensor, rows: Tensor, count: Tensor) -> None:
    """Rows of one layer out of the offloaded tier (B, G, S', 2, D) into slots (B, N, D): K and V of the critical, or V
    alone (key None) of the marginal. rows (2, n), count () int32: of `plan_tiers`. The bytes arrive as they left."""
    listed = torch.arange(rows.shape[1], device=rows.device)
    source, target = rows[:, listed.where(listed < count, 0)].long()  # beyond the count the first row once more
    D = value.shape[-1]
    for kind, pool in enumerate((key, value)):
        if pool is not None:
            flat, come = pool.view(-1, D), offloaded.view(-1, D).index_select(0, 2 * source + kind)
            flat.index_copy_(0, target, come.where(count > 0, flat.index_select(0, target)))


@triton.jit
def _bring_kernel(
    key_ptr, value_ptr, offloaded_ptr, rows_ptr, count_ptr, listed, D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """The programs share the list out evenly. The host's memory is read by the kernel itself, over PCIe."""
    count, dim = tl.load(count_ptr), tl.arange(0, D)
    for at in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        nth = at + tl.arange(0, ROWS)
        inside = (nth < count)[:, None]
        source = tl.load(rows_ptr + nth, mask=nth < count, other=0).to(tl.int64)[:, None] * 2 * D
        target = tl.load(rows_ptr + listed + nth, mask=nth < count, other=0).to(tl.int64)[:, None] * D
        value = tl.load(offloaded_ptr + source + D + dim, mask=inside)
        if key_ptr is not None:
            tl.store(key_ptr + target + dim, tl.load(offloaded_ptr + source + dim, mask=inside), mask=inside)
        tl.store(value_ptr + target + dim, value, mask=inside)


def bring_rows_triton(key: Tensor | None, value: Tensor, offloaded: Tensor, rows: Tensor, count: Tensor) -> None:
    assert all(x.is_contiguous() for x in (key, value, offloaded, rows) if x is not None)
    D = value.shape[-1]
    at_once = BRING_BYTES // (D * value.itemsize * (1 if key is None else 2))
    _bring_kernel[(MOVERS + (value.nbytes > LARGE),)](
        key, value, offloaded, rows, count, rows.shape[1], D=D, ROWS=at_once, num_warps=32, num_stages=1
    )


def bring_rows(key: Tensor | None, value: Tensor, offloaded: Tensor, rows: Tensor, count: Tensor) -> None:
    (bring_rows_triton if use_triton(value) else bring_rows_torch)(key, value, offloaded, rows, count)


def store_rows_torch(key: Tensor, value: Tensor, offloaded: Tensor, newest: Tensor, start: Tensor) -> None:
    """K and V of the T newest tokens of one layer, in slots newest (B, G, T) of key, value (B, N, D), into the
    offloaded tier (B, G, S', 2, D): token t of sequence b to position start[b] + t, start (B,) int32; below 0:
    nothing."""
    slot = newest.flatten(1).long()[..., None].expand(-1, -1, key.shape[2])
    both = torch.stack([pool.gather(1, slot) for pool in (key, value)], 2).unflatten(1, newest.shape[1:])  # (B,G,T,2,D)
    position = (start[:, None] + torch.arange(newest.shape[2], device=start.device)).clamp(min=0).long()
    position = position[:, None, :, None, None].expand(both.shape)
    offloaded.scatter_(2, position, both.where(start[:, None, None, None, None] >= 0, offloaded.gather(2, position)))


@triton.jit
def _store_kernel(
    key_ptr, value_ptr, offloaded_ptr, newest_ptr, start_ptr, slots, host_rows,
    G: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One token of one KV head."""
    pair, t, dim = (tl.program_id(0) // T).to(tl.int64), tl.program_id(0) % T, tl.arange(0, D)
    start = tl.load(start_ptr + pair // G)
    if start >= 0:
        source = (pair // G * slots + tl.load(newest_ptr + pair * T + t)) * D + dim
        target = offloaded_ptr + (pair * host_rows + start + t) * 2 * D + dim
        tl.store(target, tl.load(key_ptr + source))
        tl.store(target + D, tl.load(value_ptr + source))


def store_rows_triton(key: Tensor, value: Tensor, offloaded: Tensor, newest: Tensor, start: Tensor) -> None:
    assert all(x.is_contiguous() for x in (key, value, offloaded, newest))
    _store_kernel[(newest.numel(),)](
        key, value, offloaded, newest, start, key.shape[1], offloaded.shape[2],
        G=newest.shape[1], T=newest.shape[2], D=key.shape[2], num_warps=1,
    )  # fmt: skip


def store_rows(key: Tensor, value: Tensor, offloaded: Tensor, newest: Tensor, start: Tensor) -> None:
    (store_rows_triton if use_triton(key) else store_rows_torch)(key, value, offloaded, newest, start)
