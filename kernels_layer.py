"""The small work between the matrix products of a decode step, in Triton: norms, RoPE with the cache write, the gate.

Where it sits: inside the layers of both models in a decode step (graph.py). None of it is the paper's; each is one
launch instead of five, since a step of 52 layers has no time for launches. The norm also adds up the parts in which the
product before it may come (kernels_product.py), which with few rows has the gate inside as well: the gate alone is for
many rows and INT4. Twins (`..._torch`) as everywhere.

Shapes follow the legend in model.py; decode drops the T dimension: activations are (B, hidden).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from int8_rows import LEVELS, Scales, encode, levels
from model import apply_rope

GATE_BLOCK = 1024


# ---- The twins -------------------------------------------------------------------------------------------------------


def add_norm_torch(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x += update in place (if there is one), then RMSNorm of x (B, hidden), as model.RMSNorm.

    update: (B, hidden), or the parts of a sum, (splits, B, hidden) fp32, that `split_product` leaves
    (kernels_product.py).
    """
    if update is not None:
        x += update if update.dim() == 2 else update.sum(0).to(x.dtype)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rope_append_torch(
    qkv: Tensor, cos: Tensor, sin: Tensor, length: Tensor, norms: tuple[Tensor, Tensor, float] | None, key: Tensor,
    value: Tensor, key_slot: Tensor | None = None, value_slot: Tensor | None = None, newest: Tensor | None = None,
    tokens: int = 1, scales: Scales = (None, None),
) -> Tensor:  # fmt: skip
    """Split qkv (B, (H + 2G) D) into heads, rotate query and key, put key and value where they belong.

    cos, sin (S, D/2) fp32 by position; the newest token of sequence b stands at length[b] - 1. norms: weights (D,) of
    query and key and the epsilon, for models that norm their heads before RoPE. key, value (B, G, slots, D) are
    written at key_slot, value_slot (B, G) int32; None: at the token's position. newest (2, B, G, D), if given, takes
    both rows too. Returns the query (B, H, D).

    tokens: T of them a sequence, the first at length[b] - 1. Then the rows of qkv, query, slots and newest count B * T,
    a sequence's own one after the other. scales: K's and V's, (B, G, 2, D) each, if key, value and newest are int8.
    """
    B, G, _, D = key.shape
    heads = qkv.view(B * tokens, -1, D)
    H = heads.shape[1] - 2 * G
    query, fresh, rows = heads[:, :H], heads[:, H : H + G], heads[:, H + G :]
    if norms is not None:
        query = add_norm_torch(query, None, norms[0], norms[2])
        fresh = add_norm_torch(fresh, None, norms[1], norms[2])
    position = (length.long()[:, None] - 1 + torch.arange(tokens, device=length.device)).flatten()  # (B * T,)
    cosine, sine = (torch.cat((table, table), -1)[position][:, None] for table in (cos, sin))  # (B * T, 1, D)
    query = apply_rope(query.float(), cosine, sine).to(qkv.dtype)
    fresh = apply_rope(fresh.float(), cosine, sine).to(qkv.dtype)
    if scales[0] is not None:
        fresh, rows = (encode(row, scale.repeat_interleave(tokens, 0)) for row, scale in zip((fresh, rows), scales))
    for pool, slot, row in ((key, key_slot, fresh), (value, value_slot, rows)):
        slot = position[:, None].expand(-1, G) if slot is None else slot.long()  # (B * T, G)
        slot, row = (table.unflatten(0, (B, tokens)).transpose(1, 2) for table in (slot, row))  # (B, G, T, ...)
        pool.scatter_(2, slot[..., None].expand_as(row), row)
    if newest is not None:
        newest[0], newest[1] = fresh, rows
    return query.contiguous()


def gate_torch(both: Tensor) -> Tensor:
    """silu(gate) * up, both in one tensor: (B, 2 inner) -> (B, inner)."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


# ---- The kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _norm_kernel(
    x_ptr, update_ptr, weight_ptr, out_ptr, size, cells, eps, UPDATES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    cell, inside = tl.program_id(0) * size + at, at < size
    x = tl.load(x_ptr + cell, mask=inside, other=0.0)
    if UPDATES > 0:
        update = tl.zeros([BLOCK], tl.float32)
        for part in tl.static_range(UPDATES):
            update += tl.load(update_ptr + part * cells + cell, mask=inside, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + update.to(x.dtype).to(tl.float32)).to(x.dtype)
        tl.store(x_ptr + cell, x, mask=inside)
    wide = x.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + cell, (weight.to(tl.float32) * wide.to(x.dtype).to(tl.float32)).to(x.dtype), mask=inside)


@triton.jit
def _put(target, first, second, scale, D: tl.constexpr, INT8: tl.constexpr, LEVELS: tl.constexpr):
    """Both halves of a row, as they are or rounded."""
    dim = tl.arange(0, D // 2)
    if INT8:
        more = scale + D // 2
        first = levels(first.to(tl.float32), tl.load(scale + dim), tl.load(scale + D + dim), LEVELS)
        second = levels(second.to(tl.float32), tl.load(more + dim), tl.load(more + D + dim), LEVELS)
    tl.store(target + dim, first)
    tl.store(target + D // 2 + dim, second)


@triton.jit
def _rope_kernel(
    qkv_ptr, cos_ptr, sin_ptr, length_ptr, q_norm_ptr, k_norm_ptr, q_ptr, key_ptr, value_ptr, key_slot_ptr,
    value_slot_ptr, newest_ptr, key_scale_ptr, value_scale_ptr, eps, key_batch, key_head, value_batch,
    value_head, newest_half,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, T: tl.constexpr, NORM: tl.constexpr, SLOTS: tl.constexpr,
    NEWEST: tl.constexpr, INT8: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """One head of one token, T of them a sequence; query, key or value by its number."""
    row, head = tl.program_id(0), tl.program_id(1)
    b = row // T
    dim = tl.arange(0, D // 2)
    source = qkv_ptr + (row * (H + 2 * G) + head) * D
    first, second = tl.load(source + dim), tl.load(source + D // 2 + dim)
    dtype = first.dtype
    position = tl.load(length_ptr + b) - 1 + row % T
    if head < H + G:
        one, two = first.to(tl.float32), second.to(tl.float32)
        if NORM:
            scale = tl.rsqrt((tl.sum(one * one, 0) + tl.sum(two * two, 0)) / D + eps)
            weight_ptr = tl.where(head < H, q_norm_ptr, k_norm_ptr)
            left, right = tl.load(weight_ptr + dim).to(tl.float32), tl.load(weight_ptr + D // 2 + dim).to(tl.float32)
            one = ((one * scale).to(dtype).to(tl.float32) * left).to(dtype).to(tl.float32)
            two = ((two * scale).to(dtype).to(tl.float32) * right).to(dtype).to(tl.float32)
        cos = tl.load(cos_ptr + position * (D // 2) + dim)
        sin = tl.load(sin_ptr + position * (D // 2) + dim)
        first, second = (one * cos - two * sin).to(dtype), (two * cos + one * sin).to(dtype)
    if head < H:
        query = q_ptr + (row * H + head) * D
        tl.store(query + dim, first)
        tl.store(query + D // 2 + dim, second)
    else:
        g = (head - H) % G
        if head < H + G:
            slot = tl.load(key_slot_ptr + row * G + g) if SLOTS else position
            target = key_ptr + b.to(tl.int64) * key_batch + g * key_head + slot * D
            copy = newest_ptr + (row * G + g) * D
        else:
            slot = tl.load(value_slot_ptr + row * G + g) if SLOTS else position
            target = value_ptr + b.to(tl.int64) * value_batch + g * value_head + slot * D
            copy = newest_ptr + newest_half + (row * G + g) * D
        scale = tl.where(head < H + G, key_scale_ptr, value_scale_ptr) + (b * G + g) * 2 * D
        _put(target, first, second, scale, D, INT8, LEVELS)
        if NEWEST:
            _put(copy, first, second, scale, D, INT8, LEVELS)


@triton.jit
def _gate_kernel(both_ptr, out_ptr, inner, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    gate = tl.load(both_ptr + row * 2 * inner + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + row * 2 * inner + inner + at, mask=inside, other=0.0)
    silu = (gate / (1 + tl.exp(-gate))).to(up.dtype)
    tl.store(out_ptr + row * inner + at, silu * up, mask=inside)


# ---- The launchers ---------------------------------------------------------------------------------------------------


def add_norm_triton(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    B, size = x.shape
    out, parts = torch.empty_like(x), 0
    if update is not None:
        assert update.is_contiguous()
        parts = len(update) if update.dim() == 3 else 1
    _norm_kernel[(B,)](
        x, x if update is None else update, weight, out, size, B * size, eps,
        UPDATES=parts, BLOCK=triton.next_power_of_2(size), num_warps=8 if size > 2048 else 4,
    )  # fmt: skip
    return out


def rope_append_triton(
    qkv: Tensor, cos: Tensor, sin: Tensor, length: Tensor, norms: tuple[Tensor, Tensor, float] | None, key: Tensor,
    value: Tensor, key_slot: Tensor | None = None, value_slot: Tensor | None = None, newest: Tensor | None = None,
    tokens: int = 1, scales: Scales = (None, None),
) -> Tensor:  # fmt: skip
    B, G, _, D = key.shape
    H = qkv.shape[1] // D - 2 * G
    assert key.stride()[2:] == (D, 1) and value.stride()[2:] == (D, 1) and qkv.is_contiguous()
    assert newest is None or newest[0].is_contiguous()
    int8 = scales[0] is not None
    assert all(scale.is_contiguous() for scale in scales if int8)
    query = torch.empty(B * tokens, H, D, device=qkv.device, dtype=qkv.dtype)
    q_norm, k_norm, eps = norms if norms is not None else (cos, cos, 0.0)
    _rope_kernel[(B * tokens, H + 2 * G)](
        qkv, cos, sin, length, q_norm, k_norm, query, key, value,
        length if key_slot is None else key_slot, length if value_slot is None else value_slot,
        query if newest is None else newest, *(scales if int8 else (cos, cos)), eps,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), 0 if newest is None else newest.stride(0),
        H=H, G=G, D=D, T=tokens, NORM=norms is not None, SLOTS=key_slot is not None, NEWEST=newest is not None,
        INT8=int8, LEVELS=LEVELS, num_warps=1,
    )  # fmt: skip
    return query


def gate_triton(both: Tensor) -> Tensor:
    B, inner = both.shape[0], both.shape[1] // 2
    out = torch.empty(B, inner, device=both.device, dtype=both.dtype)
    _gate_kernel[(B, triton.cdiv(inner, GATE_BLOCK))](both, out, inner, BLOCK=GATE_BLOCK, num_warps=4)
    return out
