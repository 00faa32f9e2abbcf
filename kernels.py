"""Every attention: a prefill's over many queries, a decode step's over the rows of a cache (Eq. 6).

Where it sits: below the caches (cache.py), which call nothing else to attend. Each function that runs in a step or is
costly in a prefill stands here twice with one signature, `NAME_torch` (the plain PyTorch truth) and `NAME_triton`;
`NAME` chooses (ops.py). What attention says of tokens goes into scores by scores.py.

| function           | flow                                               | paper                 |
| ------------------ | -------------------------------------------------- | --------------------- |
| `causal_attention` | prefill of both models                             | vanilla attention     |
| `attention_rows`   | matching window                                    | the matrices of Eq. 1 |
| `column_sums`      | prefill -> scores                                  | Eq. 1, in blocks      |
| `decode_attention` | every step: full cache, SLM, the LLM's tiers, drafts | Eq. 6               |

Shapes follow the legend in model.py.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ops import use_triton

LOG2_E = math.log2(math.e)  # logits are powers of two: exp2 is one instruction
NEGLIGIBLE = 1e-9  # weights below it are beyond fp32's resolution
SCORE_BLOCK = 256  # query rows whose attention is held at once when scores are summed
QUERIES, KEYS = 64, 64  # a tile of the column sums
TILE, WARPS, STAGES = 4096, 4, 4  # of decode attention: numbers of a tile of K, and of V; held STAGES - 1 times
PROGRAMS = 264  # splits aimed at: two for each multiprocessor of an H100
ROWS_MAX = 64  # query rows of one program
HALF_MAX = 65504.0  # the largest fp16: logits stop there


# ---- Many queries: prefill -------------------------------------------------------------------------------------------


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of T queries, the last T of S tokens, on all S: (B, H, T, D) x (B, G, S, D)^2 -> (B, H, T, D).

    Flash attention where PyTorch has it; no T x S matrix is kept.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)  # (B, H, S, D)
    if query.shape[2] == key.shape[2]:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    # Imported here: it brings torch._dynamo along, seconds that only a prompt of several chunks should wait for.
    from torch.nn.attention.bias import causal_lower_right

    return F.scaled_dot_product_attention(query, key, value, attn_mask=causal_lower_right(query.shape[2], key.shape[2]))


def attention_rows(query: Tensor, key: Tensor, first: int = 0) -> Tensor:
    """Softmax attention of queries at positions first..first+T-1 on keys 0..S-1, causal: (B, H, T, S) fp32.

    For the few rows that are looked at one by one; its memory is H x T x S, so callers keep T small. Queries are scaled
    before the product: unscaled products of fp16 can pass 65,504.
    """
    B, H, T, D = query.shape
    G, S = key.shape[1], key.shape[2]
    grouped = query.reshape(B, G, H // G, T, D)
    logits = (grouped * D**-0.5 @ key[:, :, None].transpose(-1, -2)).float()  # (B, G, H/G, T, S)
    queries = torch.arange(first, first + T, device=query.device)[:, None]
    future = torch.arange(S, device=query.device) > queries  # (T, S)
    return logits.masked_fill(future, -torch.inf).softmax(-1).view(B, H, T, S)


def queries_that_count(decay: float, queries: int) -> int:
    """How many of the last `queries` have a weight, decay^age, worth the work; decay 0 keeps the newest alone."""
    if decay == 1:
        return queries
    return 1 if decay == 0 else min(queries, 1 + math.ceil(math.log(NEGLIGIBLE) / math.log(decay)))


def column_sums_torch(query: Tensor, key: Tensor, decay: float) -> Tensor:
    """Scores that T queries (B, H, T, D), the last T of S tokens, leave on keys (B, G, S, D), Eq. 1: (B, H, S) fp32.

    sum over queries q of decay^(last - q) * A[q, j], by blocks of SCORE_BLOCK queries, so that memory is O(S).
    decay = 1 is the paper's plain sum. With decay < 1 queries whose weights are below fp32's resolution are skipped.
    """
    B, H, T, _ = query.shape
    S = key.shape[2]
    scores = torch.zeros(B, H, S, dtype=torch.float32, device=query.device)
    for start in range(T - queries_that_count(decay, T), T, SCORE_BLOCK):
        end = min(start + SCORE_BLOCK, T)
        age = torch.arange(T - start - 1, T - end - 1, -1, device=query.device, dtype=torch.float32)  # (block,)
        rows = attention_rows(query[:, :, start:end], key[:, :, : S - T + end], first=S - T + start)
        scores[:, :, : S - T + end] += (torch.pow(decay, age)[:, None] * rows).sum(2)
    return scores


@triton.jit
def _tile(query, k_ptr, token, k_token, last, S, scale, D: tl.constexpr):
    """Causal logits (QUERIES, KEYS) of queries at positions `last` on keys at `token`, -inf where nothing is seen."""
    dim = tl.arange(0, D)
    key = tl.load(k_ptr + token.to(tl.int64)[:, None] * k_token + dim, mask=(token < S)[:, None], other=0.0)
    logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    return tl.where(token[None] <= last[:, None], logit, -float("inf"))


@triton.jit
def _lse_kernel(
    q_ptr, k_ptr, lse_ptr, k_batch, k_head, k_token, T, S, count, scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The log of the sum of QUERIES queries' weights; `count` of the T queries take part, the last ones."""
    head, row, dim = tl.program_id(1), tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, D)
    b, h = head // H, head % H
    last = S - count + row
    place = (b.to(tl.int64) * T + T - count + row) * H + h
    query = tl.load(q_ptr + place[:, None] * D + dim, mask=(row < count)[:, None], other=0.0)
    keys = k_ptr + b.to(tl.int64) * k_batch + (h // GROUP) * k_head
    top, total = tl.full([QUERIES], -float("inf"), tl.float32), tl.zeros([QUERIES], tl.float32)
    for at in range(0, tl.minimum(S - count + (tl.program_id(0) + 1) * QUERIES, S), KEYS):
        logit = _tile(query, keys, at + tl.arange(0, KEYS), k_token, last, S, scale, D)
        higher = tl.maximum(top, tl.max(logit, 1))  # the first tile has key 0, which every query sees
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(logit - higher[:, None]), 1)
        top = higher
    tl.store(lse_ptr + head.to(tl.int64) * count + row, top + tl.log2(total), mask=row < count)


@triton.jit
def _column_kernel(
    q_ptr, k_ptr, lse_ptr, out_ptr, k_batch, k_head, k_token, T, S, count, scale, log_decay,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """KEYS keys: the weights of the queries that see them, from the first such tile on."""
    head, token, dim = tl.program_id(1), tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.arange(0, D)
    b, h = head // H, head % H
    keys = k_ptr + b.to(tl.int64) * k_batch + (h // GROUP) * k_head
    column = tl.zeros([KEYS], tl.float32)
    for at in range(tl.maximum(tl.program_id(0) * KEYS - (S - count), 0) // QUERIES * QUERIES, count, QUERIES):
        row = at + tl.arange(0, QUERIES)
        live = row < count
        place = (b.to(tl.int64) * T + T - count + row) * H + h
        query = tl.load(q_ptr + place[:, None] * D + dim, mask=live[:, None], other=0.0)
        logit = _tile(query, keys, token, k_token, S - count + row, S, scale, D)
        lse = tl.load(lse_ptr + head.to(tl.int64) * count + row, mask=live, other=float("inf"))
        age = tl.where(live, count - 1 - row, 0).to(tl.float32)
        column += tl.sum(tl.exp2(logit - lse[:, None] + (age * log_decay)[:, None]), 0)
    tl.store(out_ptr + head.to(tl.int64) * S + token, column, mask=token < S)


def column_sums_triton(query: Tensor, key: Tensor, decay: float) -> Tensor:
    """A flash forward keeps no matrix, so the logits are made a second time, tile by tile: one kernel finds the log of
    each query's sum, the other walks down the columns with it."""
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    count = queries_that_count(decay, T)
    query = query.transpose(1, 2).contiguous()  # (B, T, H, D), as the products leave it
    assert key.stride(3) == 1
    lse, out = (torch.empty(B * H, n, device=query.device, dtype=torch.float32) for n in (count, S))
    numbers = *key.stride()[:3], T, S, count, D**-0.5 * LOG2_E
    shape = dict(H=H, GROUP=H // G, D=D, QUERIES=QUERIES, KEYS=KEYS, num_warps=4, num_stages=2)
    _lse_kernel[(triton.cdiv(count, QUERIES), B * H)](query, key, lse, *numbers, **shape)
    log_decay = math.log2(decay) if decay > 0 else 0.0
    _column_kernel[(triton.cdiv(S, KEYS), B * H)](query, key, lse, out, *numbers, log_decay, **shape)
    return out.view(B, H, S)


def column_sums(query: Tensor, key: Tensor, decay: float) -> Tensor:
    return (column_sums_triton if use_triton(query) else column_sums_torch)(query, key, decay)


# ---- A few queries: decode -------------------------------------------------------------------------------------------


def decode_attention_torch(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, position: Tensor | None = None,
    logits: Tensor | None = None, lse: Tensor | None = None, weight: Tensor | None = None,
    marginal: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """T new tokens of each sequence on a cache whose rows lie in slots: query (B, T, H, D), key, value (B, G, C, D).

    length (B,) int32: tokens of each sequence with the first new one; new token t sees those before length + t.
    position (B, G, C) int32: the token in each slot, -1 if none; None: slot j holds token j. logits (B, T, H, C) fp32
    or fp16, if given, takes the scaled products as powers of two: what is not seen is -inf, but for slots beyond the
    last one that any new token sees where position is None, which are left as they are.

    weight (B, T, H, M) fp32 and marginal (B, G, M, D), if given: attention borrowed from the SLM for tokens of which
    the LLM keeps V alone, 0 in free slots (Eq. 6):

        o = (1 - m) softmax(q K_C) V_C + sum over j in M of A'_f(i)[j] V_j,    m = sum over j in M of A'_f(i)[j]

    The paper leaves the factor (1 - m) open; with it, exact borrowed weights give exact attention.

    Returns the output (B, T, H, D) and lse (B, T, H) fp32, the one given if there is one: 2 ** (logits - lse) is what
    each slot weighs in the output.
    """
    B, T, H, D = query.shape
    G, C = key.shape[1:3]
    slot = torch.arange(C, device=key.device)
    token = slot.expand(B, G, C) if position is None else position
    end = length[:, None] + torch.arange(T, device=key.device)  # (B, T)
    seen = (token[:, :, None] >= 0) & (token[:, :, None] < end[:, None, :, None])  # (B, G, T, C)

    def fold(rows: Tensor, table: Tensor) -> Tensor:
        """(B, G, H/G, T, x) @ (B, G, x, y): heads and tokens as one side, or the table is copied for each head."""
        return (rows.flatten(2, 3) @ table).unflatten(2, rows.shape[2:4])

    grouped = query.view(B, T, G, H // G, D).permute(0, 2, 3, 1, 4)  # (B, G, H/G, T, D)
    product = fold(grouped * D**-0.5, key.transpose(-1, -2)).float() * LOG2_E  # (B, G, H/G, T, C)
    product = product.masked_fill(~seen[:, :, None], -torch.inf)
    total = product.mul(1 / LOG2_E).logsumexp(-1, keepdim=True)  # natural logarithm
    share = torch.exp2(product - total * LOG2_E)
    used = seen.any(2)[..., None]  # (B, G, C, 1): a slot that is not seen may hold anything, and 0 * NaN is NaN
    out = fold(share.to(value.dtype), value.where(used, 0))  # (B, G, H/G, T, D)
    log = total[..., 0] * LOG2_E
    if weight is not None:
        borrowed = weight.view(B, T, G, H // G, -1).permute(0, 2, 3, 1, 4)  # (B, G, H/G, T, M)
        rest = (1 - borrowed.sum(-1)).clamp(min=0)  # 1 - m
        taken = (borrowed != 0).any(2).any(2)[..., None]  # (B, G, M, 1)
        out = rest[..., None].to(out.dtype) * out + fold(borrowed.to(value.dtype), marginal.where(taken, 0))
        log = log - torch.log2(rest)
    if logits is not None:
        rows = product.permute(0, 3, 1, 2, 4).reshape(B, T, H, C)
        far = (slot >= end[:, -1:])[:, None, None] if position is None else torch.zeros((), device=key.device).bool()
        logits.copy_(logits.where(far, rows.clamp(max=HALF_MAX).to(logits.dtype)))
    out, log = (x.permute(0, 3, 1, 2, *range(4, x.dim())).reshape(B, T, H, *x.shape[4:]) for x in (out, log))
    return out, log if lse is None else lse.copy_(log)


@triton.jit
def _split_kernel(
    q_ptr, k_ptr, v_ptr, length_ptr, position_ptr, logit_ptr, weight_ptr, marginal_ptr, part_ptr, slots, marginal_slots,
    size, scale, G: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One split of one KV head: unscaled output, top, sum of ROWS query rows; and the same share of the marginal
    tier."""
    pair, split = tl.program_id(0), tl.program_id(1)
    splits, b, g = tl.num_programs(1), pair // G, pair % G
    dim, row = tl.arange(0, D), tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    real, t = row < T * GROUP, row // GROUP
    place = ((b * T + t) * G + g) * GROUP + row % GROUP  # of a query among all
    query = tl.load(q_ptr + place[:, None] * D + dim, mask=real[:, None], other=0.0)  # (ROWS, D)
    length = tl.load(length_ptr + b)
    stop = slots
    if position_ptr is None:
        stop = tl.minimum(slots, length + T - 1)
    keys = pair.to(tl.int64) * slots
    top, total = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for at in range(split * size, tl.minimum(split * size + size, stop), BLOCK):
        slot = at + tl.arange(0, BLOCK)
        inside, token = slot < stop, slot
        if position_ptr is not None:
            token = tl.load(position_ptr + keys + slot, mask=inside, other=-1)
        # Loaded whether seen or not: a mask that is loaded first halves the depth of the pipeline.
        key = tl.load(k_ptr + (keys + slot)[:, None] * D + dim, mask=inside[:, None], other=0.0)  # (BLOCK, D)
        seen = inside & (token >= 0) & (token < (length + t)[:, None])  # (ROWS, BLOCK)
        logit = tl.where(seen, tl.dot(query, tl.trans(key), input_precision="ieee") * scale, -float("inf"))
        if logit_ptr is not None:
            line = logit_ptr + place.to(tl.int64)[:, None] * slots + slot
            tl.store(line, tl.minimum(logit, 65504.0).to(logit_ptr.dtype.element_ty), mask=real[:, None] & inside)
        higher = tl.maximum(top, tl.max(logit, 1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has seen nothing yet
        share, shrink = tl.exp2(logit - anchor[:, None]), tl.exp2(top - anchor)
        value = tl.load(v_ptr + (keys + slot)[:, None] * D + dim, mask=inside[:, None], other=0.0)
        value = tl.where(((token >= 0) & (token < length + T - 1))[:, None], value, 0.0)  # else it may be NaN
        acc = acc * shrink[:, None] + tl.dot(share.to(value.dtype), value, input_precision="ieee")
        total, top = total * shrink[:, None] + share, higher
    WIDTH: tl.constexpr = 2 * D + 4
    part = part_ptr + (place.to(tl.int64) * splits + split) * WIDTH
    tl.store(part[:, None] + dim, acc, mask=real[:, None])
    tl.store(part + 2 * D, top, mask=real)
    tl.store(part + 2 * D + 1, tl.sum(total, 1), mask=real)
    if weight_ptr is not None:
        share = tl.cdiv(tl.cdiv(marginal_slots, BLOCK), splits) * BLOCK
        mass, acc = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, D], tl.float32)
        for at in range(split * share, tl.minimum(split * share + share, marginal_slots), BLOCK):
            slot = at + tl.arange(0, BLOCK)
            inside = slot < marginal_slots
            line = weight_ptr + place.to(tl.int64)[:, None] * marginal_slots + slot
            borrowed = tl.load(line, mask=real[:, None] & inside, other=0.0)  # (ROWS, BLOCK)
            rows = pair.to(tl.int64) * marginal_slots + slot
            value = tl.load(marginal_ptr + rows[:, None] * D + dim, mask=inside[:, None], other=0.0)
            value = tl.where((tl.max(borrowed, 0) > 0)[:, None], value, 0.0)
            acc += tl.dot(borrowed.to(value.dtype), value, input_precision="ieee")
            mass += tl.sum(borrowed, 1)
        tl.store(part[:, None] + D + dim, acc, mask=real[:, None])
        tl.store(part + 2 * D + 2, mass, mask=real)


@triton.jit
def _merge_kernel(
    out_ptr, lse_ptr, part_ptr, splits, D: tl.constexpr, SPLITS: tl.constexpr, MARGINAL: tl.constexpr
):  # fmt: skip
    """The splits of one query head of one token."""
    place, split, dim = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS), tl.arange(0, D)
    part, live = part_ptr + (place * splits + split) * (2 * D + 4), split < splits
    tops = tl.load(part + 2 * D, mask=live, other=-float("inf"))
    sums = tl.load(part + 2 * D + 1, mask=live, other=0.0)
    acc = tl.load(part[:, None] + dim, mask=live[:, None], other=0.0)  # (SPLITS, D)
    top = tl.max(tops, 0)
    shrink = tl.exp2(tops - top)
    total = tl.sum(sums * shrink, 0)
    out = tl.sum(acc * shrink[:, None], 0) / total
    lse = top + tl.log2(total)
    if MARGINAL:
        rest = tl.maximum(1 - tl.sum(tl.load(part + 2 * D + 2, mask=live, other=0.0), 0), 0.0)  # 1 - m
        out = rest * out + tl.sum(tl.load(part[:, None] + D + dim, mask=live[:, None], other=0.0), 0)
        lse -= tl.log2(rest)
    tl.store(out_ptr + place * D + dim, out.to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + place, lse)


def decode_attention_triton(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, position: Tensor | None = None,
    logits: Tensor | None = None, lse: Tensor | None = None, weight: Tensor | None = None,
    marginal: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Flash decoding: the slots are cut into splits; a program takes one split of one KV head for all query rows that
    share it, so each row of K and V is read once; a second kernel merges the splits."""
    B, T, H, D = query.shape
    G, C = key.shape[1:3]
    lse = torch.empty(B, T, H, device=query.device, dtype=torch.float32) if lse is None else lse
    tables = query, key, value, position, logits, lse, weight, marginal
    assert all(table.is_contiguous() for table in tables if table is not None)
    group = H // G
    rows = max(16, min(ROWS_MAX, triton.next_power_of_2(T * group)))  # 16: what a matrix unit takes
    blocks = triton.cdiv(T * group, rows)
    half = query.element_size() == 2  # fp32 takes twice the shared memory
    block = max(16, TILE // D // (1 if half else 2))
    size = block * max(2, triton.cdiv(C, block * max(1, PROGRAMS // (B * G * blocks))))
    splits = triton.cdiv(C, size)
    out = torch.empty_like(query)
    part = torch.empty(B * T * H, splits, 2 * D + 4, device=query.device, dtype=torch.float32)
    _split_kernel[(B * G, splits, blocks)](
        query, key, value, length, position, logits, weight, marginal, part, C,
        0 if marginal is None else marginal.shape[2], size, D**-0.5 * LOG2_E,
        G=G, GROUP=group, T=T, ROWS=rows, D=D, BLOCK=block, num_warps=WARPS, num_stages=STAGES if half else 2,
    )  # fmt: skip
    _merge_kernel[(B * T * H,)](
        out, lse, part, splits, D=D, SPLITS=triton.next_power_of_2(splits), MARGINAL=weight is not None,
        num_warps=4 if splits <= 32 else 8,
    )  # fmt: skip
    return out, lse


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, position: Tensor | None = None,
    logits: Tensor | None = None, lse: Tensor | None = None, weight: Tensor | None = None,
    marginal: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    function = decode_attention_triton if use_triton(query) else decode_attention_torch
    return function(query, key, value, length, position, logits, lse, weight, marginal)
