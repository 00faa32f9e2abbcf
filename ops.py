"""The small work between the matrix products of a decoder's layer: norm, RoPE with the cache's append, gate.

Where it sits: inside model.py, for both models, in a prefill and in every decode step. None of it is the paper's. Each
function stands here twice with one signature, `NAME_torch` (the plain PyTorch truth) and `NAME_triton` (one kernel),
and once without a suffix: that one chooses. All other kernels of the project choose in the same way, by `use_triton`.

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

    qkv (B, T, (H + 2G) D), position (B, T) int32. key, value (B, G, N, D) are written at slot (B, G, T) int32; None: at
    the position.
    """
    query, fresh, rows = rotate(qkv, rope, key.shape[1], key.shape[3])
    fresh, rows = fresh.transpose(1, 2), rows.transpose(1, 2)  # (B, G, T, D)
    where = position[:, None].expand(fresh.shape[:3]) if slot is None else slot
    for pool, row in ((key, fresh), (value, rows)):
        pool.scatter_(2, where.long()[..., None].expand_as(row), row)
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
            slot = tl.load(position_ptr + row)
        else:
            slot = tl.load(slot_ptr + pair * T + t)
        target = pool + (pair * slots + slot) * D
        tl.store(target + dim, first)
        tl.store(target + D // 2 + dim, second)


def rope_append_triton(
    qkv: Tensor, rope: Rope, key: Tensor, value: Tensor, position: Tensor, slot: Tensor | None = None
) -> Tensor:
    B, G, slots, D = key.shape
    T, H = qkv.shape[1], qkv.shape[2] // D - 2 * G
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
