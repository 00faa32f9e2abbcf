"""Column sums of a prefill in Triton: the scores that a chunk of queries leaves on all keys, in O(n) memory.

Where it sits: prefill of the SLM -> scores (Eq. 1). A flash forward keeps no matrix, so this pass makes the logits a
second time, tile by tile: one kernel finds each query's log-sum-exp, the other walks down the columns with it. The twin
is `kernels.column_sums`.

Shapes follow the legend in model.py.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import queries_that_count

QUERIES, KEYS = 64, 64  # one tile


@triton.jit
def _tile(query, k_ptr, base, token, last, S, scale, D: tl.constexpr):
    """Causal logits (QUERIES, KEYS) of queries at positions `last` on keys at `token`, -inf where nothing is seen."""
    dim = tl.arange(0, D)
    key = tl.load(k_ptr + base + token.to(tl.int64)[:, None] * D + dim, mask=(token < S)[:, None], other=0.0)
    logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    return tl.where(token[None] <= last[:, None], logit, -float("inf"))


@triton.jit
def _lse_kernel(
    q_ptr, k_ptr, lse_ptr, q_batch, q_head, k_batch, k_head, first, S, count, scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    b, h = head // H, head % H
    row, dim = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, D)
    last = first + row
    base = b.to(tl.int64) * q_batch + h * q_head
    query = tl.load(q_ptr + base + row[:, None] * D + dim, mask=(row < count)[:, None], other=0.0)
    base = b.to(tl.int64) * k_batch + (h // GROUP) * k_head
    top = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    end = tl.minimum(first + (tl.program_id(0) + 1) * QUERIES, S)
    for at in range(0, end, KEYS):
        logit = _tile(query, k_ptr, base, at + tl.arange(0, KEYS), last, S, scale, D)
        higher = tl.maximum(top, tl.max(logit, 1))  # the first tile has key 0, which every query sees
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logit - higher[:, None]), 1)
        top = higher
    tl.store(lse_ptr + head.to(tl.int64) * count + row, top + tl.log(total), mask=row < count)


@triton.jit
def _column_kernel(
    q_ptr, k_ptr, lse_ptr, out_ptr, q_batch, q_head, k_batch, k_head, first, S, count, scale, log_decay,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One block of keys: the queries that see it, from the first such tile on."""
    head = tl.program_id(1)
    b, h = head // H, head % H
    token, dim = tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.arange(0, D)
    q_base = b.to(tl.int64) * q_batch + h * q_head
    k_base = b.to(tl.int64) * k_batch + (h // GROUP) * k_head
    column = tl.zeros([KEYS], tl.float32)
    begin = tl.maximum(tl.program_id(0) * KEYS - first, 0) // QUERIES * QUERIES
    for at in range(begin, count, QUERIES):
        row = at + tl.arange(0, QUERIES)
        live = row < count
        query = tl.load(q_ptr + q_base + row[:, None] * D + dim, mask=live[:, None], other=0.0)
        logit = _tile(query, k_ptr, k_base, token, first + row, S, scale, D)
        lse = tl.load(lse_ptr + head.to(tl.int64) * count + row, mask=live, other=float("inf"))
        # decay^age goes into the exponent; rows beyond the last weigh exp(-inf)
        age = tl.where(live, count - 1 - row, 0).to(tl.float32)
        column += tl.sum(tl.exp(logit - lse[:, None] + (age * log_decay)[:, None]), 0)
    tl.store(out_ptr + head.to(tl.int64) * S + token, column, mask=token < S)


def column_sums_triton(query: Tensor, key: Tensor, decay: float) -> Tensor:
    """`kernels.column_sums`: query (B, H, T, D), the last T of S tokens, key (B, G, S, D) -> (B, H, S) fp32."""
    B, H, T, D = query.shape
    G, S = key.shape[1], key.shape[2]
    count = queries_that_count(decay, T)
    query = query[:, :, T - count :]
    if query.stride()[2:] != (D, 1):
        query = query.contiguous()
    assert key.stride()[2:] == (D, 1), "token rows must lie one after another"
    first = S - count
    lse = torch.empty(B * H, count, device=query.device, dtype=torch.float32)
    out = torch.empty(B, H, S, device=query.device, dtype=torch.float32)
    strides = (query.stride(0), query.stride(1), key.stride(0), key.stride(1))
    shape = dict(H=H, GROUP=H // G, D=D, QUERIES=QUERIES, KEYS=KEYS, num_warps=4, num_stages=2)
    _lse_kernel[(triton.cdiv(count, QUERIES), B * H)](query, key, lse, *strides, first, S, count, D**-0.5, **shape)
    log_decay = math.log(decay) if decay > 0 else 0.0
    _column_kernel[(triton.cdiv(S, KEYS), B * H)](
        query, key, lse, out, *strides, first, S, count, D**-0.5, log_decay, **shape
    )
    return out
